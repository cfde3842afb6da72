package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/lab/store"
)

// TestMain lets the test program stand in for a process that runs the slow experiment and may be killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LATHE_LAB_TEST"); dir != "" {
		if err := runSlow(dir, true); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const slowSteps = 15

// slow is an experiment whose arms work in steps of some milliseconds and keep a checkpoint after each. Every step done is
// noted in a log.
func slow(log string, pause time.Duration) Experiment {
	stepwise := func(slope float64) func(context.Context, *Trial) error {
		return func(ctx context.Context, t *Trial) error {
			path := filepath.Join(t.CheckpointDir(), "step")
			step, sum := 0, 0.
			if b, err := os.ReadFile(path); err == nil {
				if _, err := fmt.Sscan(string(b), &step, &sum); err != nil {
					return err
				}
			}
			for ; step < slowSteps; step++ {
				if err := ctx.Err(); err != nil {
					return err
				}
				time.Sleep(pause)
				if err := appendLine(log, fmt.Sprintf("%s %d %d", t.Arm, t.Seed, step)); err != nil {
					return err
				}
				sum += slope * float64(step) / float64(t.Seed+3)
				if err := atomicfile.WriteFile(path, []byte(fmt.Sprint(step+1, " ", sum))); err != nil {
					return err
				}
			}
			for i := range slowSteps {
				t.Series("sum", float64(i), slope*float64(i))
			}
			t.Record("sum", sum)
			img := image.NewGray(image.Rect(0, 0, 4, 4))
			img.Set(int(t.Seed), 1, color.Gray{200})
			t.Image("picture", img)
			return nil
		}
	}
	return Experiment{
		Method: "slow", Title: "a slow experiment", Recipe: map[string]int{"steps": slowSteps},
		Arms: []Arm{
			{Name: "base", Baseline: true, Run: stepwise(1)},
			{Name: "method", Run: stepwise(2)},
			{Name: "constant", Once: true, Run: func(_ context.Context, t *Trial) error { t.Record("sum", 1); return nil }},
		},
		Claims: []Claim{
			{ID: "C1", Text: "the method's sum is larger", Measure: func(m Metrics) float64 { return m.Get("method", "sum") - m.Get("base", "sum") }, Bound: AtLeast(1)},
			{ID: "C2", Text: "beats the constant", Measure: func(m Metrics) float64 { return m.Get("base", "sum") / m.Get("constant", "sum") }, Bound: AtLeast(1)},
		},
	}
}

func appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

func runSlow(dir string, announce bool) error {
	s, err := store.Open(dir)
	if err != nil {
		return err
	}
	defer s.Close()
	if announce {
		fmt.Println("ready")
	}
	r, err := Run(context.Background(), slow(filepath.Join(dir, "log"), 2*time.Millisecond), Options{Scale: Full, Seeds: []uint64{0, 1, 2, 3}, Store: s})
	if err != nil {
		return err
	}
	b, err := json.Marshal(struct {
		Arms     []ArmResult
		Verdicts []Verdict
	}{withoutTimes(r.Arms), r.Verdicts})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "result.json"), b, 0o644)
}

func withoutTimes(arms []ArmResult) []ArmResult {
	for i := range arms {
		arms[i].Seconds = 0
	}
	return arms
}

// finishedUnits lists the units of all runs in a store, by key, with their metrics.
func finishedUnits(t *testing.T, dir string) map[string]string {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx := context.Background()
	if err := s.Check(ctx); err != nil {
		t.Fatal(err)
	}
	runs, err := s.Runs(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, r := range runs {
		if r.Status == store.Running {
			t.Errorf("run %d is still called running", r.ID)
		}
		units, err := s.Units(ctx, r.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range units {
			all[u.Key.Hash()] = fmt.Sprint(u.Key, u.Metrics, u.Series)
		}
	}
	return all
}

func TestKilledRunGoesOnWhereItWas(t *testing.T) {
	undisturbed := t.TempDir()
	if err := runSlow(undisturbed, false); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(undisturbed, "result.json"))
	if err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	start := func() (*exec.Cmd, *bufio.Reader) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "LATHE_LAB_TEST="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(out)
		if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("the process said %q: %v", line, err)
		}
		return cmd, r
	}
	r := rand.New(rand.NewPCG(1, 2))
	kills := 0
	before := map[string]string{}
	for range 10 {
		cmd, _ := start()
		time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
		cmd.Process.Kill()
		if cmd.Wait() != nil {
			kills++
		}
		after := finishedUnits(t, dir)
		for k, v := range before {
			if after[k] != v {
				t.Fatalf("a finished unit was lost or changed: %q, now %q", v, after[k])
			}
		}
		before = after
	}
	cmd, _ := start()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := finishedUnits(t, dir); len(got) != 9 {
		t.Errorf("%d units are stored, want 4 seeds of two arms and one of the third", len(got))
	}
	got, err := os.ReadFile(filepath.Join(dir, "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the result differs from that of a run that was not killed:\n%s\n%s", got, want)
	}

	b, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	done := map[string]int{}
	lines := strings.Fields(strings.ReplaceAll(strings.TrimSpace(string(b)), " ", "/"))
	for _, l := range lines {
		done[l]++
	}
	if len(done) != 2*4*slowSteps {
		t.Errorf("%d different steps were done, want %d", len(done), 2*4*slowSteps)
	}
	if again := len(lines) - len(done); again > kills {
		t.Errorf("%d steps were done again after %d kills; at most the unfinished one may be", again, kills)
	}
	if entries, _ := os.ReadDir(filepath.Join(dir, "checkpoints")); len(entries) != 0 {
		t.Errorf("%d checkpoints are left", len(entries))
	}
	t.Logf("%d kills hit, %d steps done again", kills, len(lines)-len(done))
}

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// counting is an experiment that counts how often each arm runs.
func counting(count map[string]int) Experiment {
	arm := func(name string, once bool) Arm {
		return Arm{Name: name, Once: once, Run: func(_ context.Context, t *Trial) error {
			count[name]++
			t.Record("value", float64(t.Seed+1))
			return nil
		}}
	}
	return Experiment{Method: "counting", Arms: []Arm{arm("a", false), arm("b", true)}, Claims: []Claim{
		{ID: "C1", Text: "a/b", Measure: func(m Metrics) float64 { return m.Get("a", "value") / m.Get("b", "value") }, Bound: AtLeast(0)},
	}}
}

func TestFinishedUnitsAreSkipped(t *testing.T) {
	s := openStore(t)
	ctx := context.Background()
	count := map[string]int{}
	e := counting(count)
	seeds := []uint64{0, 1, 2}
	run := func(o Options) {
		t.Helper()
		o.Scale, o.Store = Full, s
		if o.Seeds == nil {
			o.Seeds = seeds
		}
		if _, err := Run(ctx, e, o); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what string, a, b int) {
		t.Helper()
		if count["a"] != a || count["b"] != b {
			t.Errorf("%s: arms ran %v times, want a %d, b %d", what, count, a, b)
		}
	}
	run(Options{})
	expect("first", 3, 1)
	run(Options{})
	expect("again", 3, 1)
	run(Options{Seeds: []uint64{0, 1, 2, 3}})
	expect("one seed more", 4, 1)
	run(Options{Fresh: true})
	expect("fresh", 7, 2)
	e.Recipe = "another"
	run(Options{})
	expect("another recipe", 10, 3)
	run(Options{BackendName: "other"})
	expect("another backend", 13, 4)
}

func TestOnceArmsCountForEverySeed(t *testing.T) {
	r, err := Run(context.Background(), counting(map[string]int{}), Options{Scale: Full, Seeds: []uint64{0, 1, 2}})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.Verdicts[0].Values); got != "[1 2 3]" {
		t.Errorf("claim values %s, want [1 2 3]: b is 1 at every seed", got)
	}
	if n := len(r.Arms[1].Metrics[0].Values); n != 1 {
		t.Errorf("the once arm has %d values, want 1", n)
	}
}

func TestSharedIsComputedOncePerSeed(t *testing.T) {
	n := 0
	arm := func(name string) Arm {
		return Arm{Name: name, Run: func(_ context.Context, t *Trial) error {
			v, err := t.Shared("data", func() (any, error) { n++; return n, nil })
			if err == nil {
				t.Record("v", float64(v.(int)))
			}
			return err
		}}
	}
	r, err := Run(context.Background(), Experiment{Method: "x", Arms: []Arm{arm("a"), arm("b")}}, Options{Scale: Full, Seeds: []uint64{5, 6}})
	if err != nil {
		t.Fatal(err)
	}
	if n != 2 || fmt.Sprint(r.Arms[0].Metrics[0].Values) != "[1 2]" || fmt.Sprint(r.Arms[1].Metrics[0].Values) != "[1 2]" {
		t.Errorf("computed %d times; %v and %v", n, r.Arms[0].Metrics, r.Arms[1].Metrics)
	}
}

func TestFailingArmsDoNotStopTheOthers(t *testing.T) {
	e := Experiment{Method: "x", Arms: []Arm{
		{Name: "bad", Run: func(context.Context, *Trial) error { return errors.New("no luck") }},
		{Name: "panics", Run: func(context.Context, *Trial) error { panic("oh") }},
		{Name: "good", Run: func(_ context.Context, t *Trial) error { t.Record("v", 1); return nil }},
	}, Claims: []Claim{
		{ID: "C1", Measure: func(m Metrics) float64 { return m.Get("good", "v") }, Bound: AtLeast(0)},
		{ID: "C2", Measure: func(m Metrics) float64 { return m.Get("bad", "v") }, Bound: AtLeast(0)},
	}}
	s := openStore(t)
	r, err := Run(context.Background(), e, Options{Scale: Full, Seeds: []uint64{0, 1, 2}, Store: s})
	if err == nil || !strings.Contains(err.Error(), `arm "bad", seed 0: no luck`) || !strings.Contains(err.Error(), `arm "panics", seed 2: panic: oh`) {
		t.Errorf("error %v", err)
	}
	if r.Verdicts[0].Outcome != Holds || r.Verdicts[1].Outcome != Undecided || r.Verdicts[1].Reason != "not measured" {
		t.Errorf("verdicts %+v", r.Verdicts)
	}
	if stored, _ := s.Run(context.Background(), r.Run); stored.Status != store.Failed || !strings.Contains(stored.Error, "no luck") {
		t.Errorf("stored as %q: %q", stored.Status, stored.Error)
	}
}

func TestCancelledRunKeepsWhatIsFinished(t *testing.T) {
	s := openStore(t)
	ctx, cancel := context.WithCancel(context.Background())
	ran := 0
	e := Experiment{Method: "x", Arms: []Arm{
		{Name: "a", Run: func(_ context.Context, t *Trial) error { ran++; t.Record("v", 1); return nil }},
		{Name: "b", Run: func(ctx context.Context, t *Trial) error {
			ran++
			if ctx.Err() == nil && t.Seed == 1 {
				cancel()
				return os.WriteFile(filepath.Join(t.CheckpointDir(), "half"), nil, 0o644) // nil although it is not finished
			}
			if _, err := os.Stat(filepath.Join(t.CheckpointDir(), "half")); err != nil && t.Seed == 1 {
				return err
			}
			t.Record("v", 2)
			return nil
		}},
	}}
	o := Options{Scale: Full, Seeds: []uint64{0, 1, 2}, Store: s}
	r, err := Run(ctx, e, o)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	if stored, _ := s.Run(context.Background(), r.Run); stored.Status != store.Interrupted {
		t.Errorf("stored as %q", stored.Status)
	}
	if ran != 4 {
		t.Errorf("%d arms ran before the stop, want 4", ran)
	}
	e.Arms[1].Run = func(_ context.Context, t *Trial) error {
		ran++
		if _, err := os.Stat(filepath.Join(t.CheckpointDir(), "half")); err != nil && t.Seed == 1 {
			return err
		}
		t.Record("v", 2)
		return nil
	}
	if _, err := Run(context.Background(), e, o); err != nil {
		t.Fatal(err)
	}
	if ran != 4+3 {
		t.Errorf("%d arms ran in all, want 7: three were left", ran)
	}
}

func TestJudge(t *testing.T) {
	seeds := []uint64{0, 1, 2}
	for name, c := range map[string]struct {
		bound  Bound
		scale  Scale
		values []float64
		want   Outcome
		reason string
	}{
		"whole interval above":       {AtLeast(1), Full, []float64{2, 2.01, 2.02}, Holds, ""},
		"whole interval below":       {AtLeast(1), Full, []float64{0, 0.01, 0.02}, Fails, ""},
		"bound inside":               {AtLeast(1), Full, []float64{0.5, 1.2, 2}, Undecided, "the mean satisfies the bound, part of the interval"},
		"bound inside, mean below":   {AtLeast(1), Full, []float64{0.3, 0.8, 1.5}, Undecided, "the mean does not satisfy the bound, part of the interval"},
		"at most, holds":             {AtMost(1), Full, []float64{0.5, 0.51, 0.52}, Holds, ""},
		"at most, fails":             {AtMost(1), Full, []float64{1.5, 1.51, 1.52}, Fails, ""},
		"equal to the bound":         {AtLeast(1), Full, []float64{1, 1, 1}, Holds, ""},
		"equal values":               {AtMost(0.3), Full, []float64{0.1, 0.1, 0.1}, Holds, ""},
		"all missing":                {AtLeast(1), Full, []float64{math.NaN(), math.NaN(), math.NaN()}, Undecided, "not measured"},
		"one missing":                {AtLeast(1), Full, []float64{5, math.NaN(), 5}, Undecided, "not measured at seed 1"},
		"infinite":                   {AtLeast(1), Full, []float64{5, math.Inf(1), 5}, Undecided, "not measured at seed 1"},
		"no seeds":                   {AtLeast(1), Full, nil, Undecided, "not measured"},
		"one seed":                   {AtLeast(1), Full, []float64{5}, Undecided, "one seed gives no interval; the mean satisfies the bound"},
		"two seeds decide with care": {AtLeast(1), Full, []float64{5, 5.01}, Holds, "only 2 seeds, 3 are needed"},
		"smoke":                      {AtLeast(1), Smoke, []float64{5, 5, 5}, Undecided, "smoke scale is not judged; the mean satisfies the bound"},
	} {
		v := Judge(Claim{ID: "C", Bound: c.bound}, c.scale, seeds, c.values)
		if v.Outcome != c.want || !strings.HasPrefix(v.Reason, c.reason) || (c.reason == "") != (v.Reason == "") {
			t.Errorf("%s: %s (%s), want %s (%s)", name, v.Outcome, v.Reason, c.want, c.reason)
		}
	}
	// t quantile 4.302653 at 2 degrees of freedom, standard error 1/√3.
	v := Judge(Claim{Bound: AtLeast(0)}, Full, seeds, []float64{1, 2, 3})
	if half := 4.302652729911275 / math.Sqrt(3); math.Abs(float64(v.High)-2-half) > 1e-9 || math.Abs(float64(v.Low)-2+half) > 1e-9 || v.Margin != 2 {
		t.Errorf("interval %v … %v, margin %v", v.Low, v.High, v.Margin)
	}
}

func TestValidateRefuses(t *testing.T) {
	run := func(context.Context, *Trial) error { return nil }
	measure := func(Metrics) float64 { return 0 }
	for want, e := range map[string]Experiment{
		"catalogue id":       {Method: "Soft NMS", Arms: []Arm{{Name: "a", Run: run}}},
		"no arms":            {Method: "x"},
		"has no name":        {Method: "x", Arms: []Arm{{Run: run}}},
		"two arms are named": {Method: "x", Arms: []Arm{{Name: "a", Run: run}, {Name: "a", Run: run}}},
		"has no Run":         {Method: "x", Arms: []Arm{{Name: "a"}}},
		"has no ID":          {Method: "x", Arms: []Arm{{Name: "a", Run: run}}, Claims: []Claim{{Measure: measure}}},
		"two claims":         {Method: "x", Arms: []Arm{{Name: "a", Run: run}}, Claims: []Claim{{ID: "C1", Measure: measure}, {ID: "C1", Measure: measure}}},
		"has no Measure":     {Method: "x", Arms: []Arm{{Name: "a", Run: run}}, Claims: []Claim{{ID: "C1"}}},
		"must be finite":     {Method: "x", Arms: []Arm{{Name: "a", Run: run}}, Claims: []Claim{{ID: "C1", Measure: measure, Bound: AtLeast(math.NaN())}}},
	} {
		if _, err := Run(context.Background(), e, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	ok := Experiment{Method: "x", Arms: []Arm{{Name: "a", Run: run}}}
	if _, err := Run(context.Background(), ok, Options{Seeds: []uint64{1, 1}}); err == nil {
		t.Error("a seed given twice was accepted")
	}
	ok.Recipe = func() {}
	if _, err := Run(context.Background(), ok, Options{}); err == nil {
		t.Error("a recipe that is no JSON was accepted")
	}
}

func TestResultSurvivesJSON(t *testing.T) {
	r, err := Run(context.Background(), slow(filepath.Join(t.TempDir(), "log"), 0), Options{Scale: Full, Command: []string{"lathe", "try", "slow"}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path, err := r.Save(dir)
	if err != nil {
		t.Fatal(err)
	}
	results, err := ReadResults(os.DirFS(dir))
	if err != nil {
		t.Fatal(err)
	}
	got := results["slow"]
	if !reflect.DeepEqual(got.Verdicts, r.Verdicts) || got.Summary() != r.Summary() || got.Environment.GoVersion != r.Environment.GoVersion {
		t.Errorf("%s: got %+v, want %+v", path, got, r)
	}
	b, _ := os.ReadFile(path)
	if !strings.Contains(string(b), `"seeds": [0, 1, 2]`) {
		t.Errorf("arrays of numbers are not on one line:\n%.400s", b)
	}
	for name, text := range map[string]string{"broken": `{"format":`, "format": `{"format":2,"method":"x"}`, "method": `{"format":1,"method":"../x"}`, "verdict": `{"format":1,"method":"x","scale":"full","claims":[{"id":"C1","verdict":"maybe"}]}`} {
		if _, err := ParseResult([]byte(text)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSaveRefusesWhatIsNoResult(t *testing.T) {
	e := counting(map[string]int{})
	smoke, _ := Run(context.Background(), e, Options{Scale: Smoke})
	if _, err := smoke.Save(t.TempDir()); err == nil {
		t.Error("a smoke run was saved")
	}
	few, _ := Run(context.Background(), e, Options{Scale: Full, Seeds: []uint64{0, 1}})
	if _, err := few.Save(t.TempDir()); err == nil {
		t.Error("a run of two seeds was saved")
	}
}

func TestLoadedResultHasCurvesAndPictures(t *testing.T) {
	s := openStore(t)
	r, err := Run(context.Background(), slow(filepath.Join(t.TempDir(), "log"), 0), Options{Scale: Full, Store: s})
	if err != nil {
		t.Fatal(err)
	}
	var fresh, loaded strings.Builder
	if err := r.Document().WriteHTML(&fresh); err != nil {
		t.Fatal(err)
	}
	l, err := Load(context.Background(), s, r.Run)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Document().WriteHTML(&loaded); err != nil {
		t.Fatal(err)
	}
	if fresh.String() != loaded.String() {
		t.Error("the report of the stored run differs from that of the run itself")
	}
	for _, want := range []string{"data:image/png;base64,", "class=\"line s0 dashed\"", "HOLDS", "sum"} {
		if !strings.Contains(fresh.String(), want) {
			t.Errorf("the report lacks %q", want)
		}
	}
}

func TestEventsTellTheWholeStory(t *testing.T) {
	s := openStore(t)
	e := counting(map[string]int{})
	for i, want := range []string{"1a0 4a0 1b0 4b0 1a1 4a1", "0a0 0b0 0a1"} {
		var got []string
		_, err := Run(context.Background(), e, Options{Scale: Full, Seeds: []uint64{0, 1}, Store: s, Observe: func(e Event) {
			got = append(got, strconv.Itoa(int(e.Kind))+e.Arm+strconv.FormatUint(e.Seed, 10))
			if e.Units != 3 || e.Method != "counting" {
				t.Errorf("event %+v", e)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("run %d: events %v, want %s", i, got, want)
		}
	}
}
