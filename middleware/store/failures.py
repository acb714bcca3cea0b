"""Which errors say that a store is away, full or read-only for now, so that the same will work later."""

import errno
import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""A disk that is full, over its quota, or mounted read-only."""
_SQLITE_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR})
_SQLITE_AWAY = _SQLITE_NO_ROOM | {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN}
"""Primary result codes (https://sqlite.org/rescode.html); extended ones hold them in the low byte."""
_POSTGRES_NO_ROOM = ("53100", "25006")
"""SQLSTATE: disk_full, read_only_sql_transaction (PostgreSQL, appendix A)."""


def is_out_of_room(error: BaseException) -> bool:
    """Whether the store answers and cannot take more: full, or read-only."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    if not isinstance(error, DBAPIError):
        return False
    code = _sqlite_code(error)
    return code in _SQLITE_NO_ROOM if code is not None else getattr(error.orig, "sqlstate", "") in _POSTGRES_NO_ROOM


def is_store_away(error: BaseException) -> bool:
    """Whether our store does not take what it is given now and will later: away, being restarted, locked, full or
    read-only. What was asked may have been done all the same where the connection was lost at the end."""
    if is_out_of_room(error):
        return True
    if isinstance(error, OperationalError) and _sqlite_code(error) is not None:
        return _sqlite_code(error) in _SQLITE_AWAY
    return isinstance(error, OperationalError | InterfaceError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def _sqlite_code(error: DBAPIError) -> int | None:
    """The primary result code of an SQLite error; None for what is of another database."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code & 0xFF if code is not None else None
