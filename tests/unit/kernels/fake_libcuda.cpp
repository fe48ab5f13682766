// A libcuda that starts no kernel and writes down, as one JSON object a line, what it was asked for (file: FAKE_CUDA_CALLS).
//
// Every launch is taken to be of a kernel (pointer, 128-byte tensor map, int, float). A grid of x = 666 is refused.
// Declarations are CUDA's own, so that a binding which passes something in another form shows.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#undef cuGetProcAddress
#undef cuCtxGetDevice

namespace {
void write_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
void write_line(const char *format, ...) {
  FILE *calls = fopen(getenv("FAKE_CUDA_CALLS"), "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(calls, format, arguments);
  va_end(arguments);
  fputc('\n', calls);
  fclose(calls);
}

std::string json_list(const unsigned long long *values, int count) {
  std::string list = "[";
  for (int i = 0; i < count; i++) list += (i ? ", " : "") + std::to_string(values[i]);
  return list + "]";
}
}  // namespace

extern "C" {
CUresult CUDAAPI cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetProcAddress_v2(const char *symbol, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *status) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(symbol) + "_v2").c_str());
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
  *device = 40 + ordinal;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorString(CUresult status, const char **text) {
  *text = status == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES ? "too many resources requested for launch" : "another error";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *, void **, unsigned num_jit_options,
                                   CUlibraryOption *, void **, unsigned num_library_options) {
  write_line(R"({"call": "load", "code": "%.8s", "num_options": %u})", (const char *)code, num_jit_options + num_library_options);
  *library = (CUlibrary)0x111;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  if (!strcmp(name, "missing")) return CUDA_ERROR_NOT_FOUND;
  write_line(R"({"call": "kernel", "library": %llu, "name": "%s"})", (unsigned long long)library, name);
  *kernel = (CUkernel)0x222;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  write_line(R"({"call": "attribute", "attribute": %d, "value": %d, "kernel": %llu, "device": %d})", attribute, value,
             (unsigned long long)kernel, device);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                        const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                        const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2_promotion,
                                        CUtensorMapFloatOOBfill fill) {
  unsigned long long wide_dims[5], wide_strides[5], wide_box[5], wide_element_strides[5];
  for (unsigned i = 0; i < rank; i++) {
    wide_dims[i] = dims[i];
    wide_box[i] = box[i];
    wide_element_strides[i] = element_strides[i];
    if (i + 1 < rank) wide_strides[i] = strides[i];
  }
  write_line(R"({"call": "encode", "type": %d, "address": %llu, "dims": %s, "strides": %s, "box": %s, "element_strides": %s, )"
             R"("interleave": %d, "swizzle": %d, "l2_promotion": %d, "fill": %d, "misaligned": %llu})",
             type, (unsigned long long)address, json_list(wide_dims, rank).c_str(), json_list(wide_strides, rank - 1).c_str(),
             json_list(wide_box, rank).c_str(), json_list(wide_element_strides, rank).c_str(), interleave, swizzle, l2_promotion,
             fill, (unsigned long long)map % 64);
  for (int i = 0; i < 16; i++) map->opaque[i] = 1000 + i;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **parameters, void **extra) {
  if (config->gridDimX == 666) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  std::string attributes;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const CUlaunchAttribute &attribute = config->attrs[i];
    const unsigned long long cluster[] = {attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z};
    attributes += (i ? ", " : "") + std::string("[") + std::to_string(attribute.id) + ", " +
                  (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                       ? json_list(cluster, 3)
                       : std::to_string(attribute.value.programmaticStreamSerializationAllowed)) + "]";
  }
  const unsigned long long grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned long long block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const auto *map = (const CUtensorMap *)parameters[1];
  unsigned long long opaque[16];
  for (int i = 0; i < 16; i++) opaque[i] = map->opaque[i];
  write_line(R"({"call": "launch", "kernel": %llu, "grid": %s, "block": %s, "shared": %u, "stream": %llu, "attributes": [%s], )"
             R"("pointer": %llu, "map": %s, "map_misaligned": %llu, "int": %d, "float": %.9g, "has_extra": %d})",
             (unsigned long long)kernel, json_list(grid, 3).c_str(), json_list(block, 3).c_str(), config->sharedMemBytes,
             (unsigned long long)config->hStream, attributes.c_str(), *(unsigned long long *)parameters[0],
             json_list(opaque, 16).c_str(), (unsigned long long)map % 64, *(int *)parameters[2], *(float *)parameters[3], extra != nullptr);
  return CUDA_SUCCESS;
}
}
