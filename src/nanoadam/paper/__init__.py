"""The paper's experiments, one recipe each."""
