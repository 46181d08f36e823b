"""Commands of ``seg4diff`` on images: segment, regions, analyze, generate. Light to import."""
