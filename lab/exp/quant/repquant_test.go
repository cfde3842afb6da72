package quant

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestRepQuantSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist", "austen")
	labtest.Smoke(t, RepQuant)
}
