package detect

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn"
)

func TestTmpTrain(t *testing.T) {
	if os.Getenv("TMPTRAIN") == "" {
		t.Skip()
	}
	var steps int
	fmt.Sscan(os.Getenv("TMPTRAIN"), &steps)
	ctx := context.Background()
	b, err := engine.Open("")
	if err != nil {
		t.Fatal(err)
	}
	items, err := data.FashionMNIST(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	test, err := data.FashionMNIST(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	t0 := time.Now()
	scenes, err := Scenes(items, 4000, SceneConfig{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	crowd, err := Scenes(test, 400, SceneConfig{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	sparse, err := Scenes(test, 200, SceneConfig{Sparse: true}, 3)
	if err != nil {
		t.Fatal(err)
	}
	hist := map[int]int{}
	for _, s := range scenes {
		hist[len(s.Objects)]++
	}
	fmt.Println("scenes", time.Since(t0), hist, b.Name())
	d, err := NewDetector(DetectorConfig{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(d.Net.Params.Count(), "params")
	t0 = time.Now()
	_, err = d.Train(ctx, b, scenes, TrainOptions{Steps: steps, Progress: func(done, total int, info learn.Info) {
		if done%50 == 0 || done < 3 {
			fmt.Println(done, info.Loss, info.Metrics, time.Since(t0))
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range map[string][]Scene{"crowd": crowd, "sparse": sparse} {
		t0 = time.Now()
		raw, err := d.Detect(ctx, b, set, DetectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(name, "detect", time.Since(t0), len(raw))
		for _, c := range []SoftNMSConfig{{Method: None}, {Method: Hard, IoUThreshold: .3}, {Method: Hard, IoUThreshold: .4}, {Method: Hard, IoUThreshold: .5}, {Method: Hard, IoUThreshold: .6}, {Method: Hard, IoUThreshold: .7}, {Method: Linear}, {Sigma: .1}, {Sigma: .3}, {Sigma: .5}, {Sigma: .7}, {Sigma: 1}} {
			kept, err := Suppress(raw, c)
			if err != nil {
				t.Fatal(err)
			}
			r, err := EvaluateCOCO(Ground(set), kept, COCOConfig{Images: len(set), Classes: 10})
			if err != nil {
				t.Fatal(err)
			}
			fmt.Printf("%v %g %g: AP %.4f AP50 %.4f AP75 %.4f AR100 %.4f\n", c.Method, c.Sigma, c.IoUThreshold, r.AP, r.AP50, r.AP75, r.AR[2])
		}
	}
}
