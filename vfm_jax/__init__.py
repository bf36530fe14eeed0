"""Train video foundation models and diffusion transformers on one loop."""
