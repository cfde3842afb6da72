package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestDenseShiftSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist", "digits")
	labtest.Smoke(t, DenseShift())
}
