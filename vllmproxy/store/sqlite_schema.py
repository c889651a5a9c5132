"""The SQLite store's file: made where there is none, brought up to this version, checked. All of it blocks."""

import os
import sqlite3
import time
from pathlib import Path
from threading import Event
from typing import Final

from vllmproxy.store.interface import SCHEMA_VERSION, CannotOpenStore
from vllmproxy.store.rows import load_row
from vllmproxy.usage.sums import NUMBERS

#: Seconds that a thread waits for another process's write; shorter than a call's deadline, so that a thread
#: is free again by the time its caller has given up. Closing waits as long at most for a thread that does, and for
#: others until they look (:func:`end_with`).
BUSY_SECONDS: Final = 1.0

#: After so many steps of SQLite's machine a thread looks whether it is to end: some 0.1 ms.
_STEPS: Final = 1000

#: Version 1. Names are BLOBs holding UTF-8, because TEXT cannot hold every Python string.
_KEYS: Final = "CREATE TABLE keys (token BLOB PRIMARY KEY, alias BLOB UNIQUE, row TEXT NOT NULL) WITHOUT ROWID"

#: Version 2: listings have an index by ``created_at``, and management calls are written down.
_SECOND: Final = (
    "ALTER TABLE keys ADD COLUMN created REAL NOT NULL DEFAULT 0",
    "CREATE INDEX keys_by_time ON keys (created, token)",
    "CREATE TABLE audit (id INTEGER PRIMARY KEY AUTOINCREMENT, entry TEXT NOT NULL)",
    "CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
    "CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END",
)

#: Version 3: what was used, day by day, and what keys have spent.
_THIRD: Final = (
    "CREATE TABLE usage (day TEXT, key BLOB, model BLOB, end_user BLOB, "
    f"{', '.join(f'{name} INTEGER NOT NULL' for name in NUMBERS)}, PRIMARY KEY (day, key, model, end_user)) "
    "WITHOUT ROWID",
    # The models and the end users that have rows of their own: there is a most of them.
    "CREATE TABLE usage_names (day TEXT, key BLOB, kind TEXT, name BLOB, PRIMARY KEY (day, key, kind, name)) "
    "WITHOUT ROWID",
    "CREATE TABLE usage_writers (writer BLOB PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE accounts (token BLOB PRIMARY KEY, period INTEGER NOT NULL, spend INTEGER NOT NULL, "
    "tokens INTEGER NOT NULL) WITHOUT ROWID",
)


def end_with(ended: Event, connection: sqlite3.Connection) -> None:
    """Have whatever ``connection`` is asked fail soon once ``ended`` is set."""
    connection.set_progress_handler(ended.is_set, _STEPS)


def prepare(path: Path, ended: Event) -> None:
    """Create the file and its schema where there are none, and check them where there are. Blocks.

    :param ended: set to give it up; then the file is as it was.
    :raises CannotOpenStore: says what is wrong with the file.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise CannotOpenStore(f"{path} cannot be created: {error.strerror}") from error
    if path.is_dir():
        raise CannotOpenStore(f"{path} is a directory: name a file with --store sqlite:PATH")
    try:
        _prepare_patiently(path, ended)
    except sqlite3.Error as error:
        raise CannotOpenStore(f"{path} cannot be used as the key store: {error}") from error


def _prepare_patiently(path: Path, ended: Event) -> None:
    """Check the file; changing the journal's mode does not by itself wait for others that just do the same."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        end_with(ended, connection)
        try:
            _check(path, connection)
            # Lookups never wait for a writer. The mode is kept in the file.
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        finally:
            connection.close()
        time.sleep(0.02)


def _check(path: Path, connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")  # of several processes that start at once, one makes the tables
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (version, tables) == (0, 0):
        connection.execute(_KEYS)
        version = 1
    if version in (1, 2):
        _check_damage(path, connection)
        version = _migrate(connection, version)
    if version != SCHEMA_VERSION:
        raise CannotOpenStore(
            f"{path} has schema version {version}, and this vllmproxy reads version {SCHEMA_VERSION}: "
            "name another file with --store sqlite:PATH, or run the vllmproxy that wrote this one"
        )
    _check_damage(path, connection)
    connection.execute("COMMIT")


def _check_damage(path: Path, connection: sqlite3.Connection) -> None:
    (state,) = connection.execute("PRAGMA quick_check('keys')").fetchone()
    if state != "ok":
        raise CannotOpenStore(f"{path} is damaged ({state}): move it away or bring back a copy of it")


def _migrate(connection: sqlite3.Connection, version: int) -> int:
    """Bring an older version up, rows as they are: fields that they lack have their defaults."""
    if version == 1:
        for statement in _SECOND:
            connection.execute(statement)
        _index(connection)
    for statement in _THIRD:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return SCHEMA_VERSION


def _index(connection: sqlite3.Connection) -> None:
    for token, row in connection.execute("SELECT token, row FROM keys").fetchall():
        try:
            created = load_row(row).created_at
        except ValueError:
            continue  # unreadable before and after; what reads it says so
        connection.execute("UPDATE keys SET created = ? WHERE token = ?", (created, token))
