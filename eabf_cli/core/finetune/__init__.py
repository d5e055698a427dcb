"""The main job: extend a model and finetune it on a few long samples."""
