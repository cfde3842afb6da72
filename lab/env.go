package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"sync"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/lab/store"
)

// Build says which lathe this program is.
type Build struct {
	Version  string `json:"version"`          // of the module: "v0.1.0", "devel"
	Commit   string `json:"commit,omitempty"` // it was built from
	Modified bool   `json:"modified"`         // from a work tree that differed from the commit
	Time     string `json:"time,omitempty"`   // of the commit
}

// ThisBuild reads what the Go linker noted.
func ThisBuild() Build {
	b := Build{Version: "devel"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		b.Version = v
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		case "vcs.time":
			b.Time = s.Value
		}
	}
	return b
}

// ThisEnvironment describes the machine and the program for the record of a run.
func ThisEnvironment(backend string) store.Environment {
	cpu, build := engine.ThisCPU(), ThisBuild()
	commit := build.Commit
	if commit != "" && build.Modified {
		commit += "+changes"
	}
	return store.Environment{
		GoVersion: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH, CPU: cpu.Model, Features: cpu.Features, Cores: cpu.Cores,
		Threads: runtime.GOMAXPROCS(0), Backend: backend, Version: build.Version, Commit: commit,
	}
}

// codeIdentity names the code that measures: the commit when the program was built from exactly that, and a hash of the
// program otherwise, so that a changed program does not take the results of another for its own.
var codeIdentity = sync.OnceValue(func() string {
	if b := ThisBuild(); b.Commit != "" && !b.Modified {
		return b.Commit
	}
	if path, err := os.Executable(); err == nil {
		if f, err := os.Open(path); err == nil {
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err == nil {
				return "program-" + hex.EncodeToString(h.Sum(nil))[:16]
			}
		}
	}
	return "unknown"
})
