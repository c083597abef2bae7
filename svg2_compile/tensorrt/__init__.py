"""``lowering="tensorrt"``: engines for everything between attentions."""
