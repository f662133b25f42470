from .schedule import resolve_schedule

__all__ = ["resolve_schedule"]
