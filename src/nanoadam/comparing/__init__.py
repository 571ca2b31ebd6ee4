"""Several finetuning runs: grids, tables, fronts, and optimizers side by side."""
