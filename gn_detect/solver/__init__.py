from .fused_sgd import fuse_sgd
from .schedule import resolve_schedule

__all__ = ["fuse_sgd", "resolve_schedule"]
