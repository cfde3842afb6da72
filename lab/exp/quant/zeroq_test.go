package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestZeroQSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist", "efficientnet-lite0", "photographs")
	labtest.Smoke(t, ZeroQ)
}
