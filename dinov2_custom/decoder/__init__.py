"""Train a detector or a segmenter on a pretrained backbone, with Hugging Face's models and training loop."""
