"""The fine-tuning loop: settings, model, steps, evaluation, checkpoints, logs."""
