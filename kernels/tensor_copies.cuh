// Written by kernels/hopper_generator.py: change that, not this.

// ---- TMA: a box of a tensor, described by a tensor map, between global and shared memory ----
//
// x counts elements along the innermost dimension. What a load asks for outside the tensor is zero and counts in
// bytes; a store there writes nothing. _hint takes an L2 policy, _multicast a mask of the cluster's blocks.

HW void tma_load_2d(void* dst, const TensorMap* map, Barrier* b, int x, int y HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                         "[%0], [%1, {%3, %4}], [%2];"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y), 2, 0, at));
}
HW void tma_load_2d_hint(void* dst, const TensorMap* map, Barrier* b, int x, int y, u64 policy HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1, {%3, %4}], [%2], %5;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "l"(policy) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y), 2, 0, at));
}
HW void tma_load_2d_multicast(void* dst, const TensorMap* map, Barrier* b, int x, int y, u16 mask HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                         "[%0], [%1, {%3, %4}], [%2], %5;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "h"(mask) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y), 2, mask, at));
}
HW void tma_store_2d(const TensorMap* map, const void* src, int x, int y HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                         ::"l"(map), "r"(shared_address(src)), "r"(x), "r"(y) : "memory"),
            emu::tma_store(map, src, emu::Coordinates(x, y), 2, at));
}

HW void tma_load_3d(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                         "[%0], [%1, {%3, %4, %5}], [%2];"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z), 3, 0, at));
}
HW void tma_load_3d_hint(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, u64 policy HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1, {%3, %4, %5}], [%2], %6;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "l"(policy) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z), 3, 0, at));
}
HW void tma_load_3d_multicast(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, u16 mask HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                         "[%0], [%1, {%3, %4, %5}], [%2], %6;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "h"(mask) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z), 3, mask, at));
}
HW void tma_store_3d(const TensorMap* map, const void* src, int x, int y, int z HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
                         ::"l"(map), "r"(shared_address(src)), "r"(x), "r"(y), "r"(z) : "memory"),
            emu::tma_store(map, src, emu::Coordinates(x, y, z), 3, at));
}

HW void tma_load_4d(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                         "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w), 4, 0, at));
}
HW void tma_load_4d_hint(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w, u64 policy HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w), 4, 0, at));
}
HW void tma_load_4d_multicast(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w, u16 mask HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                         "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w), "h"(mask) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w), 4, mask, at));
}
HW void tma_store_4d(const TensorMap* map, const void* src, int x, int y, int z, int w HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                         ::"l"(map), "r"(shared_address(src)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"),
            emu::tma_store(map, src, emu::Coordinates(x, y, z, w), 4, at));
}

HW void tma_load_5d(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w, int v HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                         "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w, v), 5, 0, at));
}
HW void tma_load_5d_hint(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w, int v, u64 policy HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "l"(policy) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w, v), 5, 0, at));
}
HW void tma_load_5d_multicast(void* dst, const TensorMap* map, Barrier* b, int x, int y, int z, int w, int v, u16 mask HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                         "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
                         ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "h"(mask) : "memory"),
            emu::tma_load(dst, map, b, emu::Coordinates(x, y, z, w, v), 5, mask, at));
}
HW void tma_store_5d(const TensorMap* map, const void* src, int x, int y, int z, int w, int v HW_AT) {
  HW_EITHER(asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                         ::"l"(map), "r"(shared_address(src)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v) : "memory"),
            emu::tma_store(map, src, emu::Coordinates(x, y, z, w, v), 5, at));
}
