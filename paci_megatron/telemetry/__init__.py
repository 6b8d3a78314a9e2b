"""Meters and metrics files. Telemetry only listens."""
