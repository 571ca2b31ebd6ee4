"""The optimizers that NanoAdam is compared with."""
