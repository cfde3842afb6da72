package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestMain makes the test program a contestant: "step NAME CPU" and "machine N" print a JSON line, "break" fails.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Getenv("LATHE_TEST_CONTESTANT") != "" {
		switch os.Args[1] {
		case "step":
			fmt.Println("a remark")
			fmt.Printf(`{"network":%q,"threads":1,"cpu_ms":%s,"wall_ms":%s,"first_ms":600,"rss_mb":90,"version":"Test 1"}`+"\n", os.Args[2], os.Args[3], os.Args[3])
		case "machine":
			fmt.Printf(`{"threads":%s,"peak_fma_flops":1e11,"read_bandwidth_bytes":1e10}`+"\n", os.Args[2])
		default:
			fmt.Fprintln(os.Stderr, "no such module: torch")
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Setenv("LATHE_TEST_CONTESTANT", "1")
	os.Exit(m.Run())
}

func contestant(name string, command func(network string) []string) Contestant {
	return Contestant{Name: name, Command: func(n string, _, _ int) []string { return append([]string{os.Args[0]}, command(n)...) }}
}

func options(networks ...string) Options {
	return Options{
		Networks: networks, Threads: []int{1, 2}, Rounds: 2, Steps: 1,
		Machine: func(t int) []string { return []string{os.Args[0], "machine", strconv.Itoa(t)} },
	}
}

func TestCompare(t *testing.T) {
	runs := map[string]int{}
	a := contestant("a", func(n string) []string { return []string{"step", n, "10"} })
	b := contestant("b", func(n string) []string { // 15 in the first run, 25 from then on
		if runs[n]++; runs[n] == 1 {
			return []string{"step", n, "15"}
		}
		return []string{"step", n, "25"}
	})
	c := contestant("c", func(n string) []string {
		if n == "mlp" {
			return []string{"break", n}
		}
		return []string{"step", n, "20"}
	})
	calls := 0
	o := options("vit", "mlp")
	o.Progress = func(done, total int, what string) {
		if done != calls || total != 24 || what == "" {
			t.Errorf("progress %d of %d, %q after %d calls", done, total, what, calls)
		}
		calls++
	}
	r, err := Compare(context.Background(), []Contestant{a, b, c}, o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Rows) != 12 || len(r.Work) != 2 || len(r.Machines) != 2 || r.Interrupted {
		t.Fatalf("%+v", r)
	}
	row := r.row("vit", "b", 1)
	if row == nil || row.CPU != 20 || row.Ratio != 2 || row.Low != 1.5 || row.High != 2.5 || row.First != 600 || row.RSS != 90 || row.Version != "Test 1" {
		t.Errorf("%+v", row)
	}
	if want := r.Work[0].Roofline(r.Machines[0]) / 20; row.Share != want {
		t.Errorf("share %v, want %v", row.Share, want)
	}
	if r.row("mlp", "c", 1) != nil || r.row("vit", "c", 2) == nil {
		t.Error("a contestant that fails on its second network has figures for it, or none for the first")
	}
	page := string(r.Page())
	for _, want := range []string{"b is Test 1", "20.0 (20.0)", "2.00 (1.50 … 2.50)", "Compiling a step takes a 0.5 s or more", "no such module: torch", "## 2 threads", "at least 1.0 on 2 of 2 networks, 1.3 on 2, 2.0 on 2", "| mlp | 10.0 (10.0) | 20.0 (20.0) | – |"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	var text strings.Builder
	if err := r.WriteText(&text, 100); err != nil || !strings.Contains(text.String(), "2.00 (1.50 … 2.50)") {
		t.Errorf("%v\n%s", err, text.String())
	}
	path := filepath.Join(t.TempDir(), "r.json")
	if err := r.WriteFile(path); err != nil {
		t.Fatal(err)
	}
	again, err := ReadResult(path)
	if err != nil || string(again.Page()) != page {
		t.Errorf("the page of the file differs (%v)", err)
	}
}

func TestCompareFails(t *testing.T) {
	good := contestant("a", func(n string) []string { return []string{"step", n, "10"} })
	broken := contestant("b", func(n string) []string { return []string{"break", n} })
	if _, err := Compare(context.Background(), []Contestant{good, broken}, options("vit")); err == nil || !strings.Contains(err.Error(), "vit on b, 1 threads") || !strings.Contains(err.Error(), "no such module: torch") {
		t.Errorf("a contestant that never works: %v", err)
	}
	none := contestant("b", func(n string) []string { return []string{"step", n, "0"} })
	if _, err := Compare(context.Background(), []Contestant{good, none}, options("vit")); err == nil || !strings.Contains(err.Error(), "measured no time") {
		t.Errorf("no time: %v", err)
	}
	if _, err := Compare(context.Background(), []Contestant{good}, options("vgg")); err == nil {
		t.Error("an unknown network was taken")
	}
	if _, err := Compare(context.Background(), nil, options("vit")); err == nil {
		t.Error("no contestants were taken")
	}
	ctx, cancel := context.WithCancel(context.Background())
	o := options("vit", "mlp")
	o.Progress = func(done, _ int, what string) {
		if strings.HasPrefix(what, "mlp") {
			cancel()
		}
	}
	r, err := Compare(ctx, []Contestant{good}, o)
	if !errors.Is(err, context.Canceled) || !r.Interrupted || len(r.Rows) != 2 || !(r.Rows[0].Share > 0) {
		t.Errorf("cancelled on the second network: %v, %+v", err, r)
	}
	path := filepath.Join(t.TempDir(), "r.json")
	for _, s := range []string{"{", `{"rows":[{"network":"vit","threads":1,"cpu_ms":1}]}`} {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadResult(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", s, err)
		}
	}
}
