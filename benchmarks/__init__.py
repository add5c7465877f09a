"""Peers side by side: what dscompile costs and saves against eager PyTorch and TorchInductor, on this machine.

``single`` times training steps, memory and compilation of one process; ``distributed`` does so over ranks, against DDP,
FSDP2 and DeepSpeed, and counts bytes on the wire; ``overhead`` times the host side alone; ``regions`` counts what is
compiled as the model gets deeper. Each prints a table and writes JSON under ``benchmarks/results/``.
"""
