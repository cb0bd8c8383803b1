"""Measurements, each with what it is compared to; results/ keeps them as JSON with device and date."""
