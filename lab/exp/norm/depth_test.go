package norm

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestMixLNSmoke(t *testing.T) {
	data.RequireTest(t, "austen")
	labtest.Smoke(t, MixLN())
}

func TestLayerNormScalingSmoke(t *testing.T) {
	data.RequireTest(t, "austen", "smollm2-135m-instruct")
	labtest.Smoke(t, LayerNormScaling())
}
