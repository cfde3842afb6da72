package curate
import ("testing";"context";"time";"os";"encoding/json"
"github.com/lathe-ml/lathe/engine"
"github.com/lathe-ml/lathe/lab")
func TestTmpFull(t *testing.T){
 if os.Getenv("H3FULL")=="" {t.Skip()}
 b,err:=engine.Open("go"); if err!=nil{t.Fatal(err)}
 st:=time.Now(); last:=st
 seeds:=[]uint64{0,1,2}
 if os.Getenv("H3FULL")=="1" {seeds=seeds[:1]}
 r,err:=lab.Run(context.Background(),DataPruning(),lab.Options{Scale:lab.Full,Seeds:seeds,Backend:b,BackendName:"go",Networks:"/tmp/h3nets",Observe:func(e lab.Event){
  if e.Kind!=lab.UnitProgress {t.Logf("%v %+v", time.Since(last).Round(time.Millisecond), e); last=time.Now()}}})
 if err!=nil{t.Error(err)}
 for _,a:=range r.Arms { for _,m:=range a.Metrics{ t.Log(a.Name,m.Name,m.Values)}}
 j,_:=json.MarshalIndent(r,""," "); t.Log(string(j))
 t.Log(time.Since(st))
}
