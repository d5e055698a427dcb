"""The parts of a model card, one file each; `eabf_cli.core.model_card` puts them together."""
