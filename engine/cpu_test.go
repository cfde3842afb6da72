package engine

import (
	"os"
	"path/filepath"
	"testing"
)

func TestProcValue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "info")
	if err := os.WriteFile(path, []byte("model\t\t: 85\nmodel name\t: Some: CPU\nmodel name\t: Another\n\nMemAvailable:    1024 kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"model name": "Some: CPU", "model": "85", "MemAvailable": "1024 kB", "MemFree": ""} {
		if got := procValue(path, key); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
	if got := procValue(path+".not", "model"); got != "" {
		t.Errorf("of no file: %q", got)
	}
}
