"""One script a claim: `python -m benchmarks.NAME [--quick]`; README.md says which and what came out."""
