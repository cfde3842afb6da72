package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
)

func TestTrainShiftWeights(t *testing.T) {
	data.RequireTest(t, "digits")
	ownStore(t)
	out := filepath.Join(t.TempDir(), "shift.safetensors")
	if code, _, stderr := lathe(t, "train", "--arch", "resnet8", "--data", "digits", "--shift", "3", "--optimizer", "sgd", "--lr", "0.1", "--steps", "3", "--batch", "16", "-o", out); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	net, err := readNetwork(out, nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := quant.ShiftsOf(net, net.Node("stage.0.0.conv1"))
	if err != nil || w.Bits != 3 {
		t.Errorf("the file holds %+v: %v", w, err)
	}
	for args, want := range map[string]string{
		"--shift 1": "2 to 5", "--shift 3 --norm none": "no norm behind it", "--shift 3 --arch mlp": "no norm behind it",
	} {
		code, _, stderr := lathe(t, append([]string{"train", "--arch", "resnet8", "--data", "digits", "--steps", "1", "-o", out}, strings.Fields(args)...)...)
		if code == 0 || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q; want %q", args, code, stderr, want)
		}
	}
}
