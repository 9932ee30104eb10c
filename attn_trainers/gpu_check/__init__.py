"""What must hold on a GPU, measured and asserted one check at a time: `attn-trainers gpu-check` (docs/gpu.md)."""
