package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// TestMain makes the test program lathe itself where a test needs an environment that is read at start-up.
func TestMain(m *testing.M) {
	if os.Getenv("LATHE_TEST_MAIN") != "" {
		os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// TestDoctorSaysWhyTheKernels: the level and what chose it, the threads and what set them.
func TestDoctorSaysWhyTheKernels(t *testing.T) {
	doctor := func(env ...string) kernels {
		t.Helper()
		cmd := exec.Command(os.Args[0], "doctor", "--json", "--backend", "go")
		cmd.Env = append(os.Environ(), append([]string{"LATHE_TEST_MAIN=1", "LATHE_ISA=", "LATHE_THREADS=", "GOMAXPROCS="}, env...)...)
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Run(); err != nil {
			t.Fatalf("%v: %v\n%s", env, err, out.String())
		}
		var d diagnosis
		if err := json.Unmarshal(out.Bytes(), &d); err != nil {
			t.Fatal(err)
		}
		return d.Kernels
	}
	best := doctor()
	if best.Level == "" || best.Reason == "" || best.Threads < 1 || !strings.Contains(best.ThreadsReason, "processors that this process may use") {
		t.Errorf("%+v", best)
	}
	low := doctor("LATHE_ISA=generic", "LATHE_THREADS=3")
	if low.Level != "generic" || !strings.Contains(low.Reason, "LATHE_ISA") && best.Level != "generic" || low.Threads != 3 || low.ThreadsReason != "LATHE_THREADS=3" {
		t.Errorf("%+v", low)
	}
	wrong := doctor("LATHE_ISA=sse", "LATHE_THREADS=many", "GOMAXPROCS=1")
	if wrong.Level != best.Level || !strings.Contains(wrong.Reason, `LATHE_ISA="sse" is not a level`) {
		t.Errorf("%+v", wrong)
	}
	if wrong.Threads != 1 || !strings.Contains(wrong.ThreadsReason, "GOMAXPROCS=1") || !strings.Contains(wrong.ThreadsReason, strconv.Quote("many")) {
		t.Errorf("%+v", wrong)
	}
}
