"""What stands between ops and models: tables, caches and modules over ops."""

from .rope import RopeTables, rope_tables

__all__ = ["RopeTables", "rope_tables"]
