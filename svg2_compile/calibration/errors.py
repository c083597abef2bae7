"""What stops a calibration."""


class CalibrationError(Exception):
    """A calibration that cannot be done, and what to do."""
