// Package store keeps the records of runs: what was started, on which machine, what it measured and what it left. It
// is one SQLite database (write-ahead log, every commit synced to disk) with the larger artefacts in files beside it,
// named by their content. Several processes may use it at once, and a process that is killed at any moment leaves it
// whole: what was committed is there, what was not is not.
package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	_ "modernc.org/sqlite" // the database driver

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/filelock"
)

// Statuses of a run.
const (
	Running     = "running"
	Done        = "done"
	Failed      = "failed"
	Interrupted = "interrupted" // stopped by a signal, or its process died
)

// ErrNotFound says that there is no such run, unit or artefact.
var ErrNotFound = errors.New("not found")

// Store is an open store. It is safe for concurrent use.
type Store struct {
	dir string
	db  *sql.DB
}

// DefaultDir is where runs are kept: $LATHE_HOME, else $XDG_DATA_HOME/lathe, else ~/.local/share/lathe.
func DefaultDir() (string, error) {
	if d := os.Getenv("LATHE_HOME"); d != "" {
		return filepath.Abs(d)
	}
	if d := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "lathe"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("store: no home folder to keep runs in (%w); set LATHE_HOME", err)
	}
	return filepath.Join(home, ".local", "share", "lathe"), nil
}

// Open opens the store in a folder and creates both if need be. Runs whose process died are marked as interrupted.
func Open(dir string) (*Store, error) {
	for _, d := range []string{dir, filepath.Join(dir, "artefacts"), filepath.Join(dir, "locks"), filepath.Join(dir, "checkpoints")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	path := filepath.Join(dir, "lathe.db")
	dsn := url.URL{Scheme: "file", Opaque: (&url.URL{Path: filepath.ToSlash(path)}).EscapedPath()}
	dsn.RawQuery = url.Values{
		"_pragma": {"busy_timeout(30000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(ON)"},
		"_txlock": {"immediate"},
	}.Encode()
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	db.SetMaxOpenConns(4)
	s := &Store{dir, db}
	ctx := context.Background()
	if err := migrate(ctx, db, path); err != nil {
		db.Close()
		if strings.Contains(err.Error(), "not a database") || strings.Contains(err.Error(), "malformed") {
			err = fmt.Errorf("%w; the file is damaged: move it away and lathe starts a new one", err)
		}
		return nil, err
	}
	if err := s.sweep(ctx); err != nil {
		db.Close()
		return nil, err
	}
	return s, nil
}

// Close closes the store.
func (s *Store) Close() error { return s.db.Close() }

// Dir is the folder of the store.
func (s *Store) Dir() string { return s.dir }

// Check returns an error when SQLite finds the database damaged or an artefact's content does not match its name.
func (s *Store) Check(ctx context.Context) error {
	rows, err := s.db.QueryContext(ctx, "PRAGMA integrity_check")
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if line != "ok" {
			return fmt.Errorf("store %s: damaged: %s", s.dir, line)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	list, err := s.artefacts(ctx, "1 = 1")
	if err != nil {
		return err
	}
	for _, a := range list {
		if _, err := s.Content(a); err != nil {
			return err
		}
	}
	return nil
}

// Environment is where a run happened.
type Environment struct {
	GoVersion string   `json:"go"`
	OS        string   `json:"os"`
	Arch      string   `json:"arch"`
	CPU       string   `json:"cpu"`
	Features  []string `json:"features,omitempty"` // instruction sets
	Cores     int      `json:"cores"`
	Threads   int      `json:"threads"` // GOMAXPROCS
	Backend   string   `json:"backend,omitempty"`
	Version   string   `json:"version"`          // of lathe
	Commit    string   `json:"commit,omitempty"` // that lathe was built from
}

// Run is the record of one execution.
type Run struct {
	ID      int64           `json:"id"`
	Kind    string          `json:"kind"` // the verb: try, train, compress, ...
	Method  string          `json:"method,omitempty"`
	Command []string        `json:"command"`
	Config  json.RawMessage `json:"config,omitempty"`
	Scale   string          `json:"scale,omitempty"`
	Seeds   []uint64        `json:"seeds,omitempty"`
	Env     Environment     `json:"environment"`
	Status  string          `json:"status"`
	Error   string          `json:"error,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Started time.Time       `json:"started"`
	Ended   time.Time       `json:"ended,omitzero"`
}

// Active is a run that goes on in this process. It holds a lock that the system releases when the process ends.
type Active struct {
	ID   int64
	s    *Store
	lock *filelock.Lock
}

// Start records that a run begins. ID, Status, Started and Ended of r are set here.
func (s *Store) Start(ctx context.Context, r Run) (*Active, error) {
	command, err1 := json.Marshal(r.Command)
	seeds, err2 := json.Marshal(r.Seeds)
	env, err3 := json.Marshal(r.Env)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	config := r.Config
	if config == nil {
		config = json.RawMessage("{}")
	}
	if !json.Valid(config) {
		return nil, fmt.Errorf("store: start run: config is not JSON: %.40q", config)
	}
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	defer tx.Rollback()
	res, err := tx.ExecContext(ctx, `INSERT INTO runs (kind, method, command, config, scale, seeds, env, status, started) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		r.Kind, r.Method, string(command), string(config), r.Scale, string(seeds), string(env), Running, time.Now().UnixNano())
	if err != nil {
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	id, err := res.LastInsertId()
	if err != nil {
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	// The lock is taken before the row can be seen, so no other process takes the run for dead.
	lock, err := filelock.TryLock(s.runLock(id))
	if err != nil {
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	if err := tx.Commit(); err != nil {
		lock.Unlock()
		return nil, fmt.Errorf("store: start run: %w", err)
	}
	return &Active{id, s, lock}, nil
}

// Finish records how the run ended, with what it concluded (marshalled to JSON; may be nil).
func (a *Active) Finish(ctx context.Context, status string, result any, cause error) error {
	defer func() {
		a.lock.Unlock()
		os.Remove(a.s.runLock(a.ID))
	}()
	var text, message string
	if result != nil {
		b, err := json.Marshal(result)
		if err != nil {
			return fmt.Errorf("store: finish run %d: %w", a.ID, err)
		}
		text = string(b)
	}
	if cause != nil {
		message = cause.Error()
	}
	if _, err := a.s.db.ExecContext(ctx, `UPDATE runs SET status = ?, error = ?, result = ?, ended = ? WHERE id = ?`, status, message, text, time.Now().UnixNano(), a.ID); err != nil {
		return fmt.Errorf("store: finish run %d: %w", a.ID, err)
	}
	return nil
}

// sweep marks runs whose process died.
func (s *Store) sweep(ctx context.Context) error {
	rows, err := s.db.QueryContext(ctx, `SELECT id FROM runs WHERE status = ?`, Running)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	var ids []int64
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			rows.Close()
			return fmt.Errorf("store: %w", err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	for _, id := range ids {
		lock, err := filelock.TryLock(s.runLock(id))
		if errors.Is(err, filelock.ErrLocked) {
			continue
		}
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
		_, err = s.db.ExecContext(ctx, `UPDATE runs SET status = ?, error = 'the process ended without a word', ended = ? WHERE id = ? AND status = ?`, Interrupted, time.Now().UnixNano(), id, Running)
		lock.Unlock()
		os.Remove(s.runLock(id))
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
	}
	return nil
}

func (s *Store) runLock(id int64) string {
	return filepath.Join(s.dir, "locks", fmt.Sprintf("run-%d.lock", id))
}

const runColumns = `id, kind, method, command, config, scale, seeds, env, status, error, result, started, ended`

func scanRun(scan func(...any) error) (Run, error) {
	var r Run
	var command, config, seeds, env, result string
	var started, ended int64
	if err := scan(&r.ID, &r.Kind, &r.Method, &command, &config, &r.Scale, &seeds, &env, &r.Status, &r.Error, &result, &started, &ended); err != nil {
		return r, err
	}
	r.Config = json.RawMessage(config)
	if result != "" {
		r.Result = json.RawMessage(result)
	}
	r.Started = time.Unix(0, started).UTC()
	if ended != 0 {
		r.Ended = time.Unix(0, ended).UTC()
	}
	return r, errors.Join(json.Unmarshal([]byte(command), &r.Command), json.Unmarshal([]byte(seeds), &r.Seeds), json.Unmarshal([]byte(env), &r.Env))
}

// Runs lists runs, the newest first: at most limit of them (0: all), of one method unless method is empty.
func (s *Store) Runs(ctx context.Context, method string, limit int) ([]Run, error) {
	if limit <= 0 {
		limit = math.MaxInt32
	}
	rows, err := s.db.QueryContext(ctx, `SELECT `+runColumns+` FROM runs WHERE ? = '' OR method = ? ORDER BY id DESC LIMIT ?`, method, method, limit)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	defer rows.Close()
	list := []Run{}
	for rows.Next() {
		r, err := scanRun(rows.Scan)
		if err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		list = append(list, r)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return list, nil
}

// Run returns one run.
func (s *Store) Run(ctx context.Context, id int64) (Run, error) {
	r, err := scanRun(s.db.QueryRowContext(ctx, `SELECT `+runColumns+` FROM runs WHERE id = ?`, id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return r, fmt.Errorf("store: run %d: %w", id, ErrNotFound)
	}
	if err != nil {
		return r, fmt.Errorf("store: run %d: %w", id, err)
	}
	return r, nil
}

// Remove deletes a run, the units that no other run uses, and the artefacts that nothing refers to any more. A run that
// goes on is refused.
func (s *Store) Remove(ctx context.Context, id int64) error {
	r, err := s.Run(ctx, id)
	if err != nil {
		return err
	}
	if r.Status == Running {
		return fmt.Errorf("store: run %d goes on; stop it first", id)
	}
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("store: remove run %d: %w", id, err)
	}
	defer tx.Rollback()
	candidates, err := s.artefacts(ctx, `run = ?1 OR unit IN (SELECT unit FROM run_units WHERE run = ?1)`, id)
	if err != nil {
		return err
	}
	for _, q := range []string{
		`CREATE TEMP TABLE IF NOT EXISTS doomed (unit INTEGER PRIMARY KEY)`,
		`DELETE FROM doomed`,
		`INSERT INTO doomed SELECT unit FROM run_units WHERE run = ?1 AND unit NOT IN (SELECT unit FROM run_units WHERE run <> ?1)`,
		`DELETE FROM units WHERE id IN (SELECT unit FROM doomed)`,
		`DELETE FROM runs WHERE id = ?1`,
	} {
		var args []any
		if strings.Contains(q, "?1") {
			args = []any{id}
		}
		if _, err := tx.ExecContext(ctx, q, args...); err != nil {
			return fmt.Errorf("store: remove run %d: %w", id, err)
		}
	}
	// Files go only after the commit: a crash between leaves files without a name, never a name without its file. The
	// write lock is held until then, so nobody refers to them anew in between.
	var files []string
	for _, a := range candidates {
		var n int
		if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM artefacts WHERE sha256 = ?`, a.SHA256).Scan(&n); err != nil {
			return fmt.Errorf("store: remove run %d: %w", id, err)
		}
		if n == 0 {
			files = append(files, s.artefactPath(a.SHA256))
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("store: remove run %d: %w", id, err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("store: remove run %d: %w", id, err)
		}
	}
	return nil
}

// Unit is a finished unit of work: one arm of one experiment at one seed, with what it recorded.
type Unit struct {
	ID      int64     `json:"id"`
	Key     UnitKey   `json:"key"`
	Metrics []Metric  `json:"metrics,omitempty"`
	Series  []Point   `json:"series,omitempty"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended"`
	Images  []Blob    `json:"-"` // only when saving
}

// UnitKey is what a unit's result depends on.
type UnitKey struct {
	Method  string `json:"method"`
	Scale   string `json:"scale"`
	Arm     string `json:"arm"`
	Seed    uint64 `json:"seed"`
	Config  string `json:"config"`  // hash of the recipe
	Backend string `json:"backend"` //
	Version string `json:"version"` // identity of the code
}

// Hash is a file-name-safe name of the key.
func (k UnitKey) Hash() string {
	b, _ := json.Marshal(k) // strings and a number: cannot fail
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// Metric is a named final value.
type Metric struct {
	Name  string
	Value float64 // NaN when it was not finite
}

// Point is one point of a named curve.
type Point struct {
	Name string
	X, Y float64
}

// Blob is the content of an artefact to be stored.
type Blob struct {
	Name, Media string
	Content     []byte
}

// Artefact is a stored file.
type Artefact struct {
	ID     int64  `json:"id"`
	Name   string `json:"name"`
	Media  string `json:"media"`
	SHA256 string `json:"sha256"`
	Bytes  int64  `json:"bytes"`
}

// SaveUnit stores a finished unit under a run, with everything it recorded, in one transaction, and returns its ID. A
// unit of the same key is replaced.
func (s *Store) SaveUnit(ctx context.Context, run int64, u Unit) (id int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("store: save arm %q of seed %d: %w", u.Key.Arm, u.Key.Seed, err)
		}
	}()
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	hash := u.Key.Hash()
	if _, err := tx.ExecContext(ctx, `DELETE FROM units WHERE key = ?`, hash); err != nil {
		return 0, err
	}
	res, err := tx.ExecContext(ctx, `INSERT INTO units (key, method, scale, arm, seed, config, version, backend, started, ended) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		hash, u.Key.Method, u.Key.Scale, u.Key.Arm, strconv.FormatUint(u.Key.Seed, 10), u.Key.Config, u.Key.Version, u.Key.Backend, u.Started.UnixNano(), u.Ended.UnixNano())
	if err != nil {
		return 0, err
	}
	if id, err = res.LastInsertId(); err != nil {
		return 0, err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO run_units (run, unit, reused) VALUES (?, ?, 0)`, run, id); err != nil {
		return 0, err
	}
	for i, m := range u.Metrics {
		var v any
		if !math.IsNaN(m.Value) && !math.IsInf(m.Value, 0) {
			v = m.Value
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO metrics (unit, position, name, value) VALUES (?, ?, ?, ?)`, id, i, m.Name, v); err != nil {
			return 0, err
		}
	}
	if len(u.Series) > 0 {
		insert, err := tx.PrepareContext(ctx, `INSERT INTO series (unit, position, name, x, y) VALUES (?, ?, ?, ?, ?)`)
		if err != nil {
			return 0, err
		}
		defer insert.Close()
		for i, p := range u.Series {
			if _, err := insert.ExecContext(ctx, id, i, p.Name, p.X, p.Y); err != nil {
				return 0, err
			}
		}
	}
	for _, b := range u.Images {
		if err := s.saveBlob(ctx, tx, nil, id, b); err != nil {
			return 0, err
		}
	}
	return id, tx.Commit()
}

// AddArtefact stores a file that belongs to a run.
func (s *Store) AddArtefact(ctx context.Context, run int64, b Blob) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("store: add artefact %q: %w", b.Name, err)
	}
	defer tx.Rollback()
	if err := s.saveBlob(ctx, tx, run, nil, b); err != nil {
		return fmt.Errorf("store: add artefact %q: %w", b.Name, err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("store: add artefact %q: %w", b.Name, err)
	}
	return nil
}

// saveBlob writes the file before its row is committed, so that a row never lacks its file.
func (s *Store) saveBlob(ctx context.Context, tx *sql.Tx, run, unit any, b Blob) error {
	h := sha256.Sum256(b.Content)
	sha := hex.EncodeToString(h[:])
	path := s.artefactPath(sha)
	if old, err := os.ReadFile(path); err != nil || !bytes.Equal(old, b.Content) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := atomicfile.WriteFile(path, b.Content); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(ctx, `INSERT INTO artefacts (run, unit, name, media, sha256, bytes) VALUES (?, ?, ?, ?, ?, ?)`, run, unit, b.Name, b.Media, sha, len(b.Content))
	return err
}

func (s *Store) artefactPath(sha string) string {
	return filepath.Join(s.dir, "artefacts", sha[:2], sha)
}

// Reuse notes that a run uses a unit that was finished before.
func (s *Store) Reuse(ctx context.Context, run, unit int64) error {
	if _, err := s.db.ExecContext(ctx, `INSERT OR IGNORE INTO run_units (run, unit, reused) VALUES (?, ?, 1)`, run, unit); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// FindUnit returns the finished unit of that key. With an empty Version, the newest of any version.
func (s *Store) FindUnit(ctx context.Context, k UnitKey) (Unit, error) {
	list, err := s.units(ctx, `WHERE method = ? AND scale = ? AND arm = ? AND seed = ? AND config = ? AND backend = ? AND (? = '' OR version = ?) ORDER BY ended DESC, id DESC LIMIT 1`,
		k.Method, k.Scale, k.Arm, strconv.FormatUint(k.Seed, 10), k.Config, k.Backend, k.Version, k.Version)
	if err != nil {
		return Unit{}, err
	}
	if len(list) == 0 {
		return Unit{}, fmt.Errorf("store: arm %q of seed %d: %w", k.Arm, k.Seed, ErrNotFound)
	}
	return list[0], nil
}

// Units lists the units of a run in the order in which they were finished.
func (s *Store) Units(ctx context.Context, run int64) ([]Unit, error) {
	return s.units(ctx, `WHERE id IN (SELECT unit FROM run_units WHERE run = ?) ORDER BY ended, id`, run)
}

func (s *Store) units(ctx context.Context, where string, args ...any) ([]Unit, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT id, method, scale, arm, seed, config, version, backend, started, ended FROM units `+where, args...)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	defer rows.Close()
	var list []Unit
	for rows.Next() {
		var u Unit
		var seed string
		var started, ended int64
		if err := rows.Scan(&u.ID, &u.Key.Method, &u.Key.Scale, &u.Key.Arm, &seed, &u.Key.Config, &u.Key.Version, &u.Key.Backend, &started, &ended); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		if u.Key.Seed, err = strconv.ParseUint(seed, 10, 64); err != nil {
			return nil, fmt.Errorf("store: unit %d: %w", u.ID, err)
		}
		u.Started, u.Ended = time.Unix(0, started).UTC(), time.Unix(0, ended).UTC()
		list = append(list, u)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	for i := range list {
		if err := s.readValues(ctx, &list[i]); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (s *Store) readValues(ctx context.Context, u *Unit) error {
	rows, err := s.db.QueryContext(ctx, `SELECT name, value FROM metrics WHERE unit = ? ORDER BY position`, u.ID)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var m Metric
		var v sql.NullFloat64
		if err := rows.Scan(&m.Name, &v); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		if m.Value = v.Float64; !v.Valid {
			m.Value = math.NaN()
		}
		u.Metrics = append(u.Metrics, m)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	points, err := s.db.QueryContext(ctx, `SELECT name, x, y FROM series WHERE unit = ? ORDER BY position`, u.ID)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer points.Close()
	for points.Next() {
		var p Point
		if err := points.Scan(&p.Name, &p.X, &p.Y); err != nil {
			return fmt.Errorf("store: %w", err)
		}
		u.Series = append(u.Series, p)
	}
	if err := points.Err(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

// UnitArtefacts lists the artefacts of a unit.
func (s *Store) UnitArtefacts(ctx context.Context, unit int64) ([]Artefact, error) {
	return s.artefacts(ctx, `unit = ?`, unit)
}

// RunArtefacts lists the artefacts of a run, without those of its units.
func (s *Store) RunArtefacts(ctx context.Context, run int64) ([]Artefact, error) {
	return s.artefacts(ctx, `run = ?`, run)
}

func (s *Store) artefacts(ctx context.Context, where string, args ...any) ([]Artefact, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT id, name, media, sha256, bytes FROM artefacts WHERE `+where+` ORDER BY id`, args...)
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	defer rows.Close()
	var list []Artefact
	for rows.Next() {
		var a Artefact
		if err := rows.Scan(&a.ID, &a.Name, &a.Media, &a.SHA256, &a.Bytes); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
		list = append(list, a)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return list, nil
}

// Content reads an artefact and checks it against its hash.
func (s *Store) Content(a Artefact) ([]byte, error) {
	if len(a.SHA256) != 2*sha256.Size {
		return nil, fmt.Errorf("store: artefact %q: %q is no SHA-256", a.Name, a.SHA256)
	}
	b, err := os.ReadFile(s.artefactPath(a.SHA256))
	if err != nil {
		return nil, fmt.Errorf("store: artefact %q: %w", a.Name, err)
	}
	if h := sha256.Sum256(b); hex.EncodeToString(h[:]) != a.SHA256 {
		return nil, fmt.Errorf("store: artefact %q: its file %s has been changed", a.Name, s.artefactPath(a.SHA256))
	}
	return b, nil
}

// CheckpointDir is the folder in which a unit that is not finished keeps what it continues from.
func (s *Store) CheckpointDir(k UnitKey) string {
	return filepath.Join(s.dir, "checkpoints", k.Hash()[:32])
}

// Lock takes the lock of that name for this process until it is released. It returns filelock.ErrLocked when another
// process has it.
func (s *Store) Lock(name string) (*filelock.Lock, error) {
	return filelock.TryLock(filepath.Join(s.dir, "locks", name+".lock"))
}
