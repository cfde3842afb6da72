package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestOFQSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist")
	labtest.Smoke(t, OFQ)
}
