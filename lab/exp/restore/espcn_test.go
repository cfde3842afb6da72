package restore

import (
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestESPCNSmoke(t *testing.T) {
	data.RequireTest(t, "photographs", "video")
	labtest.Smoke(t, ESPCN)
}
