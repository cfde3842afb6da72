package store

import (
	"context"
	"database/sql"
	"fmt"
)

// migrations turn a store of version i into one of version i+1. They only ever grow: a store of an older lathe is
// brought up to date when it is opened.
var migrations = []string{
	`
CREATE TABLE runs (
	id       INTEGER PRIMARY KEY AUTOINCREMENT,
	kind     TEXT NOT NULL,              -- verb: try, train, compress, ...
	method   TEXT NOT NULL DEFAULT '',
	command  TEXT NOT NULL DEFAULT '[]', -- JSON array of arguments
	config   TEXT NOT NULL DEFAULT '{}', -- JSON
	scale    TEXT NOT NULL DEFAULT '',
	seeds    TEXT NOT NULL DEFAULT '[]', -- JSON array
	env      TEXT NOT NULL DEFAULT '{}', -- JSON: Environment
	status   TEXT NOT NULL,
	error    TEXT NOT NULL DEFAULT '',
	result   TEXT NOT NULL DEFAULT '',   -- JSON, what the verb concluded
	started  INTEGER NOT NULL,           -- nanoseconds since 1970
	ended    INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE units (
	id       INTEGER PRIMARY KEY AUTOINCREMENT,
	key      TEXT NOT NULL UNIQUE,       -- sha256 of what the unit's result depends on
	method   TEXT NOT NULL,
	scale    TEXT NOT NULL,
	arm      TEXT NOT NULL,
	seed     TEXT NOT NULL,              -- decimal: a uint64 does not fit INTEGER
	config   TEXT NOT NULL,              -- sha256 of the recipe
	version  TEXT NOT NULL,              -- code identity
	backend  TEXT NOT NULL,
	started  INTEGER NOT NULL,
	ended    INTEGER NOT NULL
);
CREATE INDEX units_find ON units (method, scale, arm, seed, config, backend);
CREATE TABLE run_units (
	run      INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
	unit     INTEGER NOT NULL REFERENCES units (id) ON DELETE CASCADE,
	reused   INTEGER NOT NULL,
	PRIMARY KEY (run, unit)
) WITHOUT ROWID;
CREATE INDEX run_units_unit ON run_units (unit);
CREATE TABLE metrics (
	unit     INTEGER NOT NULL REFERENCES units (id) ON DELETE CASCADE,
	position INTEGER NOT NULL,
	name     TEXT NOT NULL,
	value    REAL,                       -- NULL: not finite
	PRIMARY KEY (unit, name)
) WITHOUT ROWID;
CREATE TABLE series (
	unit     INTEGER NOT NULL REFERENCES units (id) ON DELETE CASCADE,
	position INTEGER NOT NULL,
	name     TEXT NOT NULL,
	x        REAL NOT NULL,
	y        REAL NOT NULL,
	PRIMARY KEY (unit, position)
) WITHOUT ROWID;
CREATE TABLE artefacts (
	id       INTEGER PRIMARY KEY AUTOINCREMENT,
	run      INTEGER REFERENCES runs (id) ON DELETE CASCADE,
	unit     INTEGER REFERENCES units (id) ON DELETE CASCADE,
	name     TEXT NOT NULL,
	media    TEXT NOT NULL,              -- media type: image/png, text/html, ...
	sha256   TEXT NOT NULL,              -- of the content; its file lies at artefacts/ab/abcd...
	bytes    INTEGER NOT NULL,
	CHECK ((run IS NULL) <> (unit IS NULL))
);
CREATE INDEX artefacts_run ON artefacts (run);
CREATE INDEX artefacts_unit ON artefacts (unit);
CREATE INDEX artefacts_sha ON artefacts (sha256);
`,
}

// migrate brings the database to the newest version, all in one transaction.
func migrate(ctx context.Context, db *sql.DB, path string) error {
	version, err := userVersion(ctx, db)
	if err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	if version == len(migrations) {
		return nil
	}
	tx, err := db.BeginTx(ctx, nil) // immediate: see the data source name
	if err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	defer tx.Rollback()
	if version, err = userVersion(ctx, tx); err != nil { // another process may have been faster
		return fmt.Errorf("store %s: %w", path, err)
	}
	if version < 0 || version > len(migrations) {
		return fmt.Errorf("store %s: was written by a newer lathe (schema %d; this one knows up to %d); update lathe, or set LATHE_HOME to another folder", path, version, len(migrations))
	}
	for v := version; v < len(migrations); v++ {
		if _, err := tx.ExecContext(ctx, migrations[v]); err != nil {
			return fmt.Errorf("store %s: migrate to schema %d: %w", path, v+1, err)
		}
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", len(migrations))); err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("store %s: migrate: %w", path, err)
	}
	return nil
}

func userVersion(ctx context.Context, q interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
},
) (v int, err error) {
	err = q.QueryRowContext(ctx, "PRAGMA user_version").Scan(&v)
	return v, err
}
