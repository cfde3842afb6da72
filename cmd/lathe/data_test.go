package main

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
)

// A bash of our own stands in for the package clients: it notes its arguments and ends as it is told.
func TestDataFetchPackages(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the stand-in is a shell script")
	}
	ownStore(t)
	bin, cache := t.TempDir(), t.TempDir()
	noted := filepath.Join(bin, "noted")
	script := "#!/bin/sh\nwhile read line; do :; done\necho \"$@\" >\"$NOTED\"\necho \"the client says hello\"\nexit $CODE\n"
	if err := os.WriteFile(filepath.Join(bin, "bash"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	t.Setenv("NOTED", noted)
	t.Setenv("LATHE_CACHE", cache)
	t.Setenv("LATHE_OFFLINE", "")
	for _, c := range []struct {
		args, exit string
		code       int
		stderr     string
		noted      string // what the script got; "": it was not called
	}{
		{"digits kjv", "0", 1, "digits: is still not complete", "-s -- " + cache + "/ digits kjv"},
		{"digits", "1", 1, "fetching packages", "-s -- " + cache + "/ digits"},
		{"--all", "0", 0, "the client says hello", "-s -- " + cache + "/"},
		{"", "0", 2, "needs names or --all", ""},
		{"--all digits", "0", 2, "needs names or --all", ""},
		{"digts", "0", 2, `did you mean "digits"?`, ""},
	} {
		t.Setenv("CODE", c.exit)
		_ = os.Remove(noted)
		code, stdout, stderr := lathe(t, append([]string{"data", "fetch", "--packages"}, strings.Fields(c.args)...)...)
		if code != c.code || !strings.Contains(stderr, c.stderr) || stdout != "" {
			t.Errorf("%q: exit code %d, want %d; %q does not say %q; stdout %q", c.args, code, c.code, stderr, c.stderr, stdout)
		}
		if b, _ := os.ReadFile(noted); strings.TrimSpace(string(b)) != c.noted {
			t.Errorf("%q: the script got %q, want %q", c.args, b, c.noted)
		}
	}
	t.Setenv("LATHE_OFFLINE", "1")
	if code, _, stderr := lathe(t, "data", "fetch", "--packages", "digits"); code != 1 || !strings.Contains(stderr, "LATHE_OFFLINE") {
		t.Error(code, stderr)
	}
	// Every error about absent data names a command that parses.
	t.Setenv("LATHE_OFFLINE", "")
	for _, e := range data.List() {
		if err := parseCommand([]string{"data", "fetch", "--packages", e.Name}); err != nil {
			t.Error(err)
		}
	}
}
