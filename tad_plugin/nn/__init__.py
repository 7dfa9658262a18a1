"""Networks, differentiable augmentation and whitening: what the bundled loops compute with."""
