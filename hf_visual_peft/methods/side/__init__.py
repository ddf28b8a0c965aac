"""Side tuning: networks beside a backbone that read its features."""
