"""The measurements behind `eabf_cli.core.evaluation`: rows to score, their scoring, their statistics."""
