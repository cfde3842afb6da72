//go:build cgo && !noxla

package engine

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/go-xla/compute/xla"
)

// extraCandidates are the backends beside the portable one, best first.
var extraCandidates = []candidate{{
	name: "xla",
	available: func() (string, bool) {
		if p := pjrtPlugins(); len(p) > 0 {
			return "PJRT plugin " + strings.Join(p, ", "), true
		}
		return "no PJRT plugin found; install one and set PJRT_PLUGIN_LIBRARY_PATH to the folder that has it " +
			"(CPU: the file pjrt_c_api_cpu_plugin.so of the PyPI package lammps-jax-pjrt-cpu)", false
	},
	preferred: func() bool { return acceleratorPlugin() != "" },
	open: func(config string) (compute.Backend, error) {
		xla.EnableAutoInstall(false)
		if config == "" {
			config = "cpu"
			if a := acceleratorPlugin(); a != "" {
				config = a
			}
		}
		return xla.New(config)
	},
}}

// pjrtPlugins lists the plugin files on the search path. It never downloads and never waits.
func pjrtPlugins() (found []string) {
	for _, dir := range filepath.SplitList(os.Getenv("PJRT_PLUGIN_LIBRARY_PATH")) {
		files, _ := filepath.Glob(filepath.Join(dir, "pjrt*plugin*.so"))
		found = append(found, files...)
	}
	if home, err := os.UserHomeDir(); err == nil {
		for _, dir := range []string{"/usr/local/lib/go-xla", filepath.Join(home, ".local/lib/go-xla")} {
			files, _ := filepath.Glob(filepath.Join(dir, "*", "pjrt*plugin*.so"))
			flat, _ := filepath.Glob(filepath.Join(dir, "pjrt*plugin*.so"))
			found = append(append(found, files...), flat...)
		}
	}
	return found
}

// acceleratorPlugin names the accelerator that a plugin serves: "cuda", "tpu", "rocm", or "".
func acceleratorPlugin() string {
	for _, p := range pjrtPlugins() {
		for _, kind := range []string{"cuda", "tpu", "rocm"} {
			if strings.Contains(filepath.Base(p), kind) {
				return kind
			}
		}
	}
	return ""
}
