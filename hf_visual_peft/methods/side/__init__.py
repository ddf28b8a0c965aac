"""Side tuning: networks beside a backbone, fed with what it computes."""
