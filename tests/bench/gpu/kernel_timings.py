"""Every operation's timed cases, each after its check, in turns with the peers that are there."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from kernels.bench import inputs_on, summarise
from kernels.check import check_case
from kernels.clock import Clock
from kernels.launch import Device
from kernels.op import Case, Inputs, Op
from tests.bench.gpu.peers import MakePeer, Peer, decode_attention_peers, linear_peers, usable_peers
from tests.bench.gpu.prefill_peers import prefill_attention_peers

OURS = "ours"
_PEERS: dict[str, Callable[[Inputs], dict[str, MakePeer]]] = {
    "skinny_gemm": linear_peers,
    "large_gemm": linear_peers,
    "decode_attention": decode_attention_peers,
    "prefill_attention": prefill_attention_peers,
}


def time_case(op: Op, case: Case, device: Device, clock: Clock, bytes_per_us: float) -> dict[str, Any]:
    """An entry of the results: ours, and each usable peer. CheckError, LaunchError."""
    check_case(op, case, device)
    inputs = inputs_on(op, case, device)
    op.launch(device, **inputs)
    device.synchronize()
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    if op.name in _PEERS:
        peers, missing = usable_peers(_PEERS[op.name](inputs), inputs, real_output(inputs))
    runs: dict[str, Callable[[], object]] = {OURS: device.capture(lambda: op.launch(device, **inputs)).replay}
    runs |= {name: replayed(peer.run, device) for name, peer in peers.items()}
    samples = clock.samples_us(runs)
    entry = asdict(summarise(op, case, samples.pop(OURS), bytes_per_us))
    entry["peers_us"] = {name: statistics.median(its_samples) for name, its_samples in samples.items()}
    return entry | {"missing_peers": missing}


def real_output(inputs: Inputs) -> torch.Tensor:
    """What the output of a linear layer or of attention stands for, with its scale where it is e4m3."""
    real: torch.Tensor = inputs["out"].float()
    if inputs.get("static_scale") is not None:
        real *= inputs["static_scale"]
    elif inputs.get("scale") is not None:
        real *= inputs["scale"][:, None]
    return real


def replayed(run: Callable[[], object], device: Device) -> Callable[[], object]:
    """`run` as a CUDA graph, so that a peer does not wait for the host either; itself where there is no GPU."""
    if device.torch_device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def line(entry: dict[str, Any]) -> str:
    """For people."""
    head = f"{entry['op']:<16} {entry['case']:<24}"
    if "skipped" in entry:
        return f"{head} skipped: {entry['skipped']}"
    ratios = [f"{name} {us / entry['median_us']:.2f}x" for name, us in entry["peers_us"].items()]
    spread = f"[{entry['p10_us']:.1f}-{entry['p90_us']:.1f}]"
    return (
        f"{head} {entry['median_us']:>10.2f} us {spread:<18} {entry['tb_per_s']:>6.3f} TB/s "
        f"{entry['tflop_per_s']:>8.2f} TFLOP/s {entry['share_of_ceiling']:>6.1%}  {', '.join(ratios)}"
    )
