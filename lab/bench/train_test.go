package bench

import (
	"math"
	"testing"

	"github.com/lathe-ml/lathe/engine"
)

func TestEveryNetworkTrains(t *testing.T) {
	name := "go"
	if _, err := engine.Open("native"); err == nil {
		name = "native"
	}
	b, err := engine.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range Networks {
		s, err := n.Run(b, 1)
		if err != nil {
			t.Errorf("%s: %v", n.Name, err)
			continue
		}
		if math.IsNaN(s.Loss) || s.Loss <= 0 || s.Wall <= 0 || s.First <= 0 {
			t.Errorf("%s: %+v", n.Name, s)
		}
	}
	if _, err := Find("vgg"); err == nil {
		t.Error("an unknown network was found")
	}
}
