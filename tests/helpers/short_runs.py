"""Settings of the digits example that take seconds."""

SETTINGS = {
    "data.share": 0.25, "rank_space.calibration_images": 32, "rank_space.step": 4,
    "search.epochs": 6, "search.schedule": "onecycle",
    "finetune.epochs": 6, "finetune.schedule": "step", "recalibration_batches": 2,
}  # fmt: skip


SHORT = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
