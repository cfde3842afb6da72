package norm

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestSLABSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist", "austen")
	labtest.Smoke(t, SLAB())
}
