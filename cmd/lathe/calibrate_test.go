package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
)

func calibrateRun(t *testing.T, stdin []byte, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(append([]string{"calibrate"}, args...), bytes.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func calibrateJSON(t *testing.T, args ...string) calibrateReport {
	t.Helper()
	code, stdout, stderr := calibrateRun(t, nil, append(args, "--json")...)
	if code != exitDone {
		t.Fatalf("%v: exit code %d: %s", args, code, stderr)
	}
	var r calibrateReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v in %s", err, stdout)
	}
	return r
}

// calibrateCases draws labels from softmax(z/3) of five classes.
func calibrateCases(n int) (z []float32, y []int32) {
	r := rng.New(1, "logits")
	for range n {
		row, sum := make([]float64, 5), 0.
		for c := range row {
			v := 6 * r.NormFloat64()
			z = append(z, float32(v))
			row[c] = math.Exp(v / 3)
			sum += row[c]
		}
		u, c := r.Float64()*sum, 0
		for ; c < 4 && u >= row[c]; c++ {
			u -= row[c]
		}
		y = append(y, int32(c))
	}
	return z, y
}

type calibrateFiles struct{ dir, logits, labels string }

func (f calibrateFiles) path(name string) string { return filepath.Join(f.dir, name) }

func newCalibrateFiles(t *testing.T, n int) calibrateFiles {
	t.Helper()
	f := calibrateFiles{dir: t.TempDir()}
	f.logits, f.labels = f.path("logits.npy"), f.path("labels.npy")
	z, y := calibrateCases(n)
	if err := data.WriteNPYFile(f.logits, []int{n, 5}, z); err != nil {
		t.Fatal(err)
	}
	if err := data.WriteNPYFile(f.labels, []int{n}, y); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f calibrateFiles) write(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.WriteFile(f.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return f.path(name)
}

func TestCalibrateFindsTheTemperature(t *testing.T) {
	f := newCalibrateFiles(t, 3000)
	r := calibrateJSON(t, f.logits, f.labels, "--split", "0.5", "--bootstrap", "100", "-o", f.path("p.npy"), "--report", f.path("r.html"))
	if math.Abs(r.Temperature-3) > .3 || r.FittedOn != 1500 || r.MeasuredOn != 1500 || !r.Held || r.Kind != "logits" || r.Classes != 5 {
		t.Errorf("got %+v", r)
	}
	for _, g := range r.Figures {
		i := g.Interval
		if i == nil || !(i.Before[0] <= g.Before && g.Before <= i.Before[1] && i.After[0] <= g.After && g.After <= i.After[1]) {
			t.Errorf("%s: the interval %v does not hold %g and %g", g.Name, i, g.Before, g.After)
		}
		if g.Name != "accuracy" && g.Name != "mce" && !(g.After < g.Before && i.Change[1] < 0) {
			t.Errorf("%s went from %g to %g, change %v", g.Name, g.Before, g.After, i.Change)
		}
		if g.Name == "accuracy" && g.After != g.Before {
			t.Errorf("accuracy went from %g to %g", g.Before, g.After)
		}
	}
	if r.After.ECE > r.ECEIfCalibrated[1]*1.2 || r.Before.ECE < 2*r.ECEIfCalibrated[1] {
		t.Errorf("ECE %g and %g; calibrated probabilities show %v", r.Before.ECE, r.After.ECE, *r.ECEIfCalibrated)
	}
	if r.Diagnosis.Overlap {
		t.Errorf("over-confidence was taken for overlap: %+v", r.Diagnosis)
	}
	p, err := data.ReadNPYFile(f.path("p.npy"))
	if err != nil || p.Shape[0] != 3000 || p.Shape[1] != 5 {
		t.Fatalf("wrote %v, %v; want the probabilities of all cases", p, err)
	}
	sum := 0.
	for _, v := range p.Float64s()[:5] {
		sum += v
	}
	if math.Abs(sum-1) > 1e-6 {
		t.Errorf("the first row sums to %g", sum)
	}
	page, err := os.ReadFile(f.path("r.html"))
	if err != nil || !bytes.Contains(page, []byte("Reliability after")) || !bytes.Contains(page, []byte("<svg")) {
		t.Errorf("the page has no reliability diagram (%v)", err)
	}

	// The probabilities written are calibrated: a second run leaves them as they are.
	again := calibrateJSON(t, f.path("p.npy"), f.labels, "--bootstrap", "0")
	if again.Kind != "probabilities" || math.Abs(again.Temperature-1) > .1 || again.Held || len(again.Warnings) == 0 || again.Figures[1].Interval != nil {
		t.Errorf("of the calibrated probabilities: %+v", again)
	}
}

func TestCalibrateReadsEveryForm(t *testing.T) {
	f := newCalibrateFiles(t, 200)
	want := calibrateJSON(t, f.logits, f.labels, "--bootstrap", "0").Temperature
	z, y := calibrateCases(200)
	var csv, names, rows strings.Builder
	csv.WriteString("ant,bee,cat,dog,eel\n")
	names.WriteString("label\n")
	rows.WriteString("row;class\n")
	for i, l := range y {
		for c := range 5 {
			csv.WriteString(strconv.FormatFloat(float64(z[5*i+c]), 'g', -1, 32))
			csv.WriteByte(",\n"[c/4])
		}
		names.WriteString(strings.Fields("ant bee cat dog eel")[l] + "\n")
		k := 199 - i // in any order
		rows.WriteString(strconv.Itoa(k) + ";" + strconv.Itoa(int(y[k])) + "\n")
	}
	logits, byName, byRow := f.write(t, "z.csv", csv.String()), f.write(t, "names.csv", names.String()), f.write(t, "rows.csv", rows.String())
	for _, args := range [][]string{{logits, byName}, {logits, byRow}, {f.logits, byRow}, {logits, f.labels}} {
		if got := calibrateJSON(t, append(args, "--bootstrap", "0")...).Temperature; math.Abs(got-want) > 1e-6 {
			t.Errorf("%v: temperature %g, want %g", args, got, want)
		}
	}
	stream, err := os.ReadFile(f.logits)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range [][]byte{stream, []byte(csv.String())} {
		code, stdout, stderr := calibrateRun(t, in, "-", f.labels, "--bootstrap", "10", "-o", "-")
		if code != exitDone || !strings.Contains(stderr, "Temperature") || strings.Count(stdout, "\n") < 200 {
			t.Errorf("exit code %d: %s", code, stderr)
		}
	}
	// --test wherever it stands, --apply, a given temperature.
	for _, args := range [][]string{{f.logits, f.labels, "--test", logits, byName}, {"--test", logits, byName, f.logits, f.labels}, {f.logits, "--test=" + logits, byName, f.labels}} {
		r := calibrateJSON(t, append(args, "--bootstrap", "0")...)
		if math.Abs(r.Temperature-want) > 1e-6 || r.Test != logits || !r.Held || r.Input != f.logits || r.Labels != f.labels {
			t.Errorf("%v: %+v", args, r)
		}
	}
	r := calibrateJSON(t, f.logits, f.labels, "--bootstrap", "0", "--temperature", "2", "--apply", f.write(t, "new.csv", "0,0,0,0,0\n"), "-o", f.path("new-p.csv"))
	if b, err := os.ReadFile(f.path("new-p.csv")); err != nil || string(b) != "0.2,0.2,0.2,0.2,0.2\n" || r.Temperature != 2 || r.FittedOn != 0 {
		t.Errorf("wrote %q (%v), %+v", b, err, r)
	}
}

func TestCalibrateWarnsOfOverlap(t *testing.T) {
	r := rng.New(3, "overlap")
	f := calibrateFiles{dir: t.TempDir()}
	const n, k = 1500, 20
	z, y := make([]float32, n*k), make([]int32, n)
	for i := range n {
		y[i] = int32(r.IntN(k))
		at := int(y[i])
		if r.Float64() < .3 {
			at ^= 1
		}
		for c := range k {
			z[i*k+c] = float32(r.NormFloat64())
		}
		z[i*k+at] += 10
	}
	if err := data.WriteNPYFile(f.path("z.npy"), []int{n, k}, z); err != nil {
		t.Fatal(err)
	}
	if err := data.WriteNPYFile(f.path("y.npy"), []int{n}, y); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := calibrateRun(t, nil, f.path("z.npy"), f.path("y.npy"), "--bootstrap", "20")
	text := strings.Join(strings.Fields(stdout), " ")
	for _, want := range []string{"One temperature is not enough here: classes overlap", "about 1.0 other classes, where 19 would be possible", "Classes most often taken for another"} {
		if code != exitDone || !strings.Contains(text, want) {
			t.Errorf("exit code %d, %q is not in\n%s%s", code, want, stdout, stderr)
		}
	}
}

func TestCalibrateReportsFitsWithoutAnEnd(t *testing.T) {
	f := calibrateFiles{dir: t.TempDir()}
	right, one := f.write(t, "z.csv", "3,0\n0,3\n"), f.write(t, "one.csv", "3,0\n")
	for _, c := range []struct{ logits, labels, want string }{
		{right, f.write(t, "right.csv", "0\n1\n"), "ran to its lower bound"},
		{right, f.write(t, "wrong.csv", "1\n0\n"), "ran to its upper bound"},
		{f.write(t, "flat.csv", "2,2\n5,5\n"), f.path("wrong.csv"), "ran to its upper bound"},
		{one, f.write(t, "y.csv", "0\n"), "ran to its lower bound"},
	} {
		code, stdout, stderr := calibrateRun(t, nil, c.logits, c.labels)
		if code != exitDone || !strings.Contains(strings.Join(strings.Fields(stdout), " "), c.want) {
			t.Errorf("%s, %s: exit code %d, %q is not in\n%s%s", c.logits, c.labels, code, c.want, stdout, stderr)
		}
	}
}

func TestCalibrateRefuses(t *testing.T) {
	f := newCalibrateFiles(t, 20)
	out := f.path("out.npy")
	z, y := f.logits, f.labels
	huge := []byte("\x93NUMPY\x01\x00\x76\x00" + "{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 1000), }")
	huge = append(huge, bytes.Repeat([]byte(" "), 128-len(huge)-1)...)
	huge = append(huge, '\n', 1, 2, 3, 4)
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{nil, exitUsage, "a file of logits and a file of labels"},
		{[]string{z}, exitUsage, "got 1 arguments"},
		{[]string{z, y, y}, exitUsage, "got 3 arguments"},
		{[]string{z, y, "--split", "1"}, exitUsage, "--split 1"},
		{[]string{z, y, "--split", "NaN"}, exitUsage, "--split"},
		{[]string{z, y, "--split", "0.001"}, exitUsage, "leaves 0 to fit on"},
		{[]string{z, y, "--split", "0.5", "--test", z, y}, exitUsage, "exclude each other"},
		{[]string{z, y, "--test", z}, exitUsage, "--test needs two files"},
		{[]string{z, y, "--temperature", "-1"}, exitUsage, "--temperature -1"},
		{[]string{z, y, "--temperature", "2", "--split", "0.5"}, exitUsage, "nothing to fit"},
		{[]string{z, y, "--bins", "0"}, exitUsage, "--bins 0"},
		{[]string{z, y, "--bootstrap", "1000000000"}, exitUsage, "--bootstrap"},
		{[]string{z, y, "--input", "scores"}, exitUsage, "auto, logits, probabilities"},
		{[]string{z, y, "--apply", z}, exitUsage, "--apply needs -o"},
		{[]string{z, y, "-o", f.path("out.png")}, exitUsage, ".npy or .csv"},
		{[]string{z, y, "-o", z}, exitUsage, "files that are read"},
		{[]string{z, y, "--json", "-o", "-"}, exitUsage, "standard output"},
		{[]string{"-", "-"}, exitUsage, "one of the files only"},
		{[]string{z, y, "--split", "0.5", "--bin", "3"}, exitUsage, "did you mean --bins"},
		{[]string{z + "x", y, "-o", out}, exitFailed, "no such file"},
		{[]string{y, y, "-o", out}, exitFailed, "want [cases, classes]"},
		{[]string{z, z, "-o", out}, exitFailed, "100 labels for 20 cases"},
		{[]string{z, y, "--input", "probabilities", "-o", out}, exitFailed, "no probability"},
		{[]string{f.write(t, "huge.npy", string(huge)), y, "-o", out}, exitFailed, "bytes"},
		{[]string{f.write(t, "zip.npz", "PK\x03\x04stuff"), y, "-o", out}, exitFailed, "neither an .npy array nor text"},
		{[]string{f.write(t, "empty.csv", ""), y, "-o", out}, exitFailed, "no numbers"},
		{[]string{f.write(t, "ragged.csv", "1,2\n1,2,3\n"), y, "-o", out}, exitFailed, "line 2"},
		{[]string{f.write(t, "nan.csv", "1,2\n1,NaN\n"), y, "-o", out}, exitFailed, "row 1, class 1 is NaN"},
		{[]string{f.write(t, "inf.csv", "1,2\n-Inf,1\n"), y, "-o", out}, exitFailed, "row 1, class 0 is -Inf"},
		{[]string{f.write(t, "one.csv", "1\n2\n"), y, "-o", out}, exitFailed, "the columns 0, s"},
		{[]string{f.write(t, "p.csv", "0.5,0.6\n"), y, "--input", "probabilities", "-o", out}, exitFailed, "row 0 sum to 1.1"},
		{[]string{z, f.write(t, "few.csv", "1\n2\n"), "-o", out}, exitFailed, "2 labels for 20 cases"},
		{[]string{z, f.write(t, "many.csv", strings.Repeat("1\n", 21)), "-o", out}, exitFailed, "line 21"},
		{[]string{z, f.write(t, "five.csv", strings.Repeat("5\n", 20)), "-o", out}, exitFailed, "label \"5\"; want a whole number from 0 to 4"},
		{[]string{z, f.write(t, "text.csv", "a\nb\n"), "-o", out}, exitFailed, "line 1: label \"a\""},
		{[]string{z, f.write(t, "half.csv", strings.Repeat("0.5\n", 20)), "-o", out}, exitFailed, "label \"0.5\""},
		{[]string{z, f.write(t, "twice.csv", "0,1\n0,1\n"), "-o", out}, exitFailed, "row 0 has a label already"},
		{[]string{z, f.write(t, "out.csv", "-1,1\n"), "-o", out}, exitFailed, "row -1"},
		{[]string{z, f.write(t, "three.csv", "1,2,3\n"), "-o", out}, exitFailed, "3 fields"},
		{[]string{z, f.write(t, "long.csv", strings.Repeat("1", 1<<17)), "-o", out}, exitFailed, "token too long"},
		{[]string{z, y, "--test", f.write(t, "wide.csv", "1,2,3\n"), y, "-o", out}, exitFailed, "has 3 classes"},
		{[]string{z, y, "-o", filepath.Join(z, "no", "out.npy")}, exitFailed, "logits.npy"},
	} {
		code, _, stderr := calibrateRun(t, nil, c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit code %d with %q, want %d with %q", c.args, code, stderr, c.code, c.want)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a refused input left an output file")
	}
}

// FuzzCalibrate feeds any bytes as logits and labels: the command measures them or refuses them with an error of its own.
func FuzzCalibrate(f *testing.F) {
	f.Add([]byte("1,2\n3,4\n0,5\n"), []byte("0\n1\n1\n"))
	f.Add([]byte("a,b\n0.5,0.5\n1,0\n"), []byte("row,label\n1,b\n0,a\n"))
	f.Add([]byte("1e38,-1e38,0\n"), []byte("2\n"))
	f.Add([]byte("\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }           \n\x00\x00\x80?\x00\x00\x00@"), []byte("1"))
	f.Fuzz(func(t *testing.T, logits, labels []byte) {
		dir := t.TempDir()
		y := filepath.Join(dir, "labels")
		if err := os.WriteFile(y, labels, 0o600); err != nil {
			t.Fatal(err)
		}
		code, stdout, stderr := calibrateRun(t, logits, "-", y, "--json", "--bootstrap", "3")
		if strings.Contains(stderr, "internal error") || (code != exitDone && code != exitFailed) || !json.Valid([]byte(stdout)) {
			t.Errorf("exit code %d, %s%s", code, stdout, stderr)
		}
	})
}
