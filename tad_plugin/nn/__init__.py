"""Networks, their derivatives, differentiable augmentation, and the size of passes."""
