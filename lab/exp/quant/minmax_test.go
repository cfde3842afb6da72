package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestMinMaxSmoke(t *testing.T) {
	data.RequireTest(t, "doc-orientation", "austen")
	labtest.Smoke(t, MinMax)
}
