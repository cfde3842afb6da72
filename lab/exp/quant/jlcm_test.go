package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestJLCMSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist", "smollm2-135m-instruct", "austen")
	labtest.Smoke(t, JLCM())
}
