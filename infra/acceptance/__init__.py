"""What the first owner of a GPU runs: `bash infra/acceptance/gpu.sh` (docs/performance.md). Each part prints JSON lines."""
